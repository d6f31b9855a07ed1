// lora_A and lora_B as the norm kernels take them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>

#include "../factors.h"
#include "launch.h"

namespace dora_ext {

struct NormFactors {
  at::Tensor A;  // (rank, in or more), contiguous, on 16 bytes; zeros from in on
  at::Tensor B;  // (out, rank), likewise

  // Rows that don't start on 16 bytes keep W off the fast path, and W is larger: 16-bit columns of A come in eights
  // where `pad_columns` says so, and ranks above 16, of which a lane loads eight at once, do always.
  NormFactors(const at::Tensor& lora_A, const at::Tensor& lora_B, at::ScalarType dtype, bool pad_columns) {
    std::tie(A, B) = cast_factors(lora_A, lora_B, dtype);
    const int64_t rank = A.size(0), in = A.size(1);
    if (A.element_size() == 2) {
      const int64_t columns = pad_columns ? (in + 7) / 8 * 8 - in : 0;
      const int64_t ranks = rank > 16 && rank <= 64 ? (rank + 7) / 8 * 8 - rank : 0;
      if (columns > 0 || ranks > 0) A = at::constant_pad_nd(A, {0, columns, 0, ranks});
      if (ranks > 0) B = at::constant_pad_nd(B, {0, ranks});
    }
    A = aligned(A, 16);
    B = aligned(B, 16);
  }
};

}  // namespace dora_ext
