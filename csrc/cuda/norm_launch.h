// norm and norm_cached on CUDA for whoever launches something behind them. On the current stream and device; A and B in
// W's dtype, so that nothing but their own kernels is launched.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../kept_norms.h"

namespace dora_ext {

// fp32's A and B, of which the fingerprint's launch makes those in W's dtype: as cast_factors_fits has them.
struct FactorsToCast {
  const at::Tensor &A, &B;
};

// n and g of W (out, in), or (in, out) when transposed; `kept` and `cast` may be null, the latter without the former.
std::tuple<at::Tensor, at::Tensor> launch_norms(const at::Tensor& weight, const at::Tensor& lora_A,
                                                const at::Tensor& lora_B, const at::Tensor& magnitude, double scaling,
                                                bool transposed, const KeptNorms* kept, const FactorsToCast* cast);

// Leaves in kept.fingerprint (int64[4]) whether the norms of W (out, in), A and B, all contiguous, are stale.
void launch_fingerprint_alone(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                              double scaling, const KeptNorms& kept, const FactorsToCast* cast);

}  // namespace dora_ext
