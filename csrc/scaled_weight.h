// V = g * (W + s B A) from library products: for backends, dtypes and ranks without a kernel of their own.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "check.h"

namespace dora_ext {

// A few rows of memory at a time: sums in fp32 take twice the bytes of a 16-bit V.
inline Tensor compose_scaled_weight(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                    const Tensor& gain, double scaling, bool transposed) {
  const auto dtype = weight.scalar_type(), sum = accumulate_type(dtype);
  const Tensor A = lora_A.to(dtype).to(sum), B = lora_B.to(dtype).to(sum), g = gain.to(sum);
  const Tensor left = transposed ? A.t() : B, right = transposed ? B.t() : A;
  Tensor out = at::empty(weight.sizes(), weight.options());
  const int64_t rows = weight.size(0), at_once = std::max<int64_t>(1, (int64_t{4} << 20) / (weight.size(1) + 1));
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t count = std::min(at_once, rows - row);
    Tensor v = at::addmm(weight.narrow(0, row, count).to(sum), left.narrow(0, row, count), right, 1, scaling);
    v.mul_(transposed ? g : g.narrow(0, row, count).unsqueeze(1));
    out.narrow(0, row, count).copy_(v);
  }
  return out;
}

}  // namespace dora_ext
