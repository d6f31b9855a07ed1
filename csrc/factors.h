// lora_A and lora_B in half precision, where they are kept in fp32. By themselves two casts take the host, and the GPU,
// as long as two launches, in every forward.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "aligned.h"
#include "check.h"
#include "inside_op.h"

namespace dora_ext {

// Whether one launch casts both, four numbers at a time.
inline bool cast_factors_fits(const Tensor& lora_A, const Tensor& lora_B, at::ScalarType dtype) {
  const auto fits = [](const Tensor& t) {
    return t.is_cuda() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() % 4 == 0 && lies_on(t, 16);
  };
  return is_half(dtype) && fits(lora_A) && fits(lora_B) && lora_A.device() == lora_B.device();
}

inline std::tuple<Tensor, Tensor> cast_factors(const Tensor& lora_A, const Tensor& lora_B, at::ScalarType dtype) {
  if (!cast_factors_fits(lora_A, lora_B, dtype)) return {in_dtype(lora_A, dtype), in_dtype(lora_B, dtype)};
  static auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, at::ScalarType)>("dora_ext::cast_factors");
  return op.call(lora_A, lora_B, dtype);
}

}  // namespace dora_ext
