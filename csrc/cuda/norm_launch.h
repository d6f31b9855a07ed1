// norm and norm_cached on CUDA for whoever launches something behind them. On the current stream and device; A and B in
// W's dtype, so that nothing but their own kernels is launched.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../kept_norms.h"

namespace dora_ext {

// n and g of W (out, in), or (in, out) when transposed; `kept` may be null.
std::tuple<at::Tensor, at::Tensor> launch_norms(const at::Tensor& weight, const at::Tensor& lora_A,
                                                const at::Tensor& lora_B, const at::Tensor& magnitude, double scaling,
                                                bool transposed, const KeptNorms* kept);

// Leaves in kept.fingerprint (int64[4]) whether the norms of W (out, in), A and B, all contiguous, are stale.
void launch_fingerprint_alone(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                              double scaling, const KeptNorms& kept);

}  // namespace dora_ext
