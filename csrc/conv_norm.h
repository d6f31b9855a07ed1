// The norm of a convolution's weight is that of a matrix.
#pragma once

#include <ATen/core/Tensor.h>

#include "check.h"
#include "inside_op.h"

namespace dora_ext {

// norm(W, A, B, m) of W (out, in, *kernel), A (r, in, *kernel), B (out, r, 1, ...), and m in any shape, as matrices and
// a vector. The order of the columns does not matter to a norm: W keeps its own, so that channels_last weights stay a
// view, and the small A follows.
template <typename Norm>
auto conv_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
               const Norm& norm) {
  InsideOp guard;
  const bool channels_last = !weight.is_contiguous() && weight.movedim(1, -1).is_contiguous();
  const auto matrix = [&](const Tensor& t) { return (channels_last ? t.movedim(1, -1) : t).flatten(1); };
  return norm(matrix(weight), matrix(lora_A), lora_B.flatten(1), magnitude.flatten());
}

}  // namespace dora_ext
