// norm and norm_cached on CUDA for whoever launches something behind them. On the current stream and device; A and B in
// W's dtype, so that nothing but their own kernels is launched.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace dora_ext {

// What norm_cached keeps, or null and null.
struct NormMarks {
  at::Tensor *cached = nullptr, *fingerprint = nullptr;
  int64_t epoch = 0;
};

// n and g of W (out, in), or (in, out) when transposed.
std::tuple<at::Tensor, at::Tensor> launch_norms(const at::Tensor& weight, const at::Tensor& lora_A,
                                                const at::Tensor& lora_B, const at::Tensor& magnitude, double scaling,
                                                bool transposed, const NormMarks& marks);

// Leaves in marks.fingerprint (int64[4]) whether the norms of W (out, in), A and B, all contiguous, are stale.
void launch_fingerprint_alone(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
                              double scaling, const NormMarks& marks);

}  // namespace dora_ext
