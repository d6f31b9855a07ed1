// The part of check.h that knows hopper_product.
#pragma once

#include "aligned.h"
#include "check.h"

namespace dora_ext {

inline void check_hopper_product(const Tensor& left, const Tensor& right, const OptionalTensor& left_tail,
                                 const OptionalTensor& right_tail, const OptionalTensor& gain,
                                 const OptionalTensor& bias, bool right_transposed) {
  const char* op = "dora_ext::hopper_product";
  TORCH_CHECK_TYPE(is_half(left.scalar_type()), op, ": left: expected bfloat16 or float16, got ", left.scalar_type());
  const auto check_matrix = [&](const char* name, const Tensor& t) {
    check_dim(op, name, t, 2);
    TORCH_CHECK_TYPE(t.scalar_type() == left.scalar_type(), op, ": ", name, ": expected the dtype of left, ",
                     left.scalar_type(), ", got ", t.scalar_type());
    check_device(op, name, t, "left", left);
  };
  check_matrix("left", left);
  check_matrix("right", right);
  const int64_t rows = left.size(0), columns = right.size(right_transposed ? 1 : 0);
  const auto check_right = [&](const char* name, const Tensor& t, int64_t inner) {
    check_shape(op, name, t, right_transposed ? at::IntArrayRef({inner, columns}) : at::IntArrayRef({columns, inner}));
  };
  check_right("right", right, left.size(1));
  TORCH_CHECK_VALUE(left_tail.has_value() == right_tail.has_value(), op,
                    ": left_tail and right_tail: expected both or neither");
  if (left_tail) {
    check_matrix("left_tail", *left_tail);
    check_matrix("right_tail", *right_tail);
    check_shape(op, "left_tail", *left_tail, {rows, left_tail->size(1)});
    check_right("right_tail", *right_tail, left_tail->size(1));
  }
  const auto check_factor = [&](const char* name, const OptionalTensor& t) {
    if (!t) return;
    check_shape(op, name, *t, {columns});
    TORCH_CHECK_TYPE(t->scalar_type() == at::kFloat, op, ": ", name, ": expected float32, got ", t->scalar_type());
    check_device(op, name, *t, "left", left);
  };
  check_factor("gain", gain);
  check_factor("bias", bias);
}

// Why the TMA cannot take the matrix, or null. Its lines lie on 16 bytes; coordinates are ints, also where tiles stand
// out over the edge.
inline const char* product_matrix_misfit(const Tensor& t) {
  if (t.numel() == 0) return "numbers, got none";
  constexpr int64_t kLargest = int64_t{1} << 30;
  if (t.size(0) > kLargest || t.size(1) > kLargest) return "sizes up to 2^30";
  if (t.stride(1) != 1 || t.stride(0) < t.size(1) || t.stride(0) % 8 != 0) {
    return "contiguous rows, the next one a multiple of 8 numbers on";
  }
  return lies_on(t, 16) ? nullptr : "data on 16 bytes";
}

inline bool scale_rows_fits(const Tensor& weight) {
  return is_half(weight.scalar_type()) && weight.dim() == 2 && weight.is_contiguous() && weight.size(1) % 8 == 0 &&
         lies_on(weight, 16);
}

inline void check_scale_rows(const Tensor& weight, const Tensor& gain) {
  const char* op = "dora_ext::scale_rows";
  TORCH_CHECK_VALUE(scale_rows_fits(weight), op,
                    ": weight: expected a contiguous matrix in bfloat16 or float16 on 16 bytes, with a multiple of 8 "
                    "columns, got shape ",
                    text(weight.sizes()), " and ", weight.scalar_type());
  check_feature(op, "gain", gain, weight.size(0), weight);
}

}  // namespace dora_ext
