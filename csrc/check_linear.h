// The part of check.h that knows the linear layer.
#pragma once

#include "adapter_backward.h"
#include "check.h"

namespace dora_ext {

// Of t (..., features).
inline int64_t count_tokens(const Tensor& t) {
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) tokens *= t.size(d);
  return tokens;
}

// (..., features) as (tokens, features). Sizes are spelled out, because -1 is ambiguous in an empty batch.
inline Tensor as_tokens(const Tensor& t) {
  return t.dim() == 2 ? t : t.reshape({count_tokens(t), t.size(-1)});
}

inline void check_linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& magnitude, const OptionalTensor& bias, double scaling,
                         bool transposed) {
  check_float(op, "x", x);
  check_adapter(op, weight, lora_A, lora_B, scaling, transposed);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == lora_A.size(1), op, ": x: expected shape (..., ",
                    text(lora_A.size(1)), ") for weight of shape ", text(weight.sizes()), ", got ", text(x.sizes()));
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), op, ": x: expected the dtype of weight, ",
                   weight.scalar_type(), ", got ", x.scalar_type());
  check_device(op, "x", x, "weight", weight);
  check_feature(op, "magnitude", magnitude, lora_B.size(0), weight);
  if (bias) check_feature(op, "bias", *bias, lora_B.size(0), weight);
}

// Of linear_backward, or of linear_nf4_backward with `weight` of W's shape and x's dtype.
inline void check_linear_backward(const char* op, const Tensor& grad_y, const OptionalTensor& y, const Tensor& x,
                                  const Tensor& h, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                  const Tensor& magnitude, const OptionalTensor& bias, double scaling, bool transposed,
                                  bool want_b) {
  check_linear(op, x, weight, lora_A, lora_B, magnitude, bias, scaling, transposed);
  auto shape = x.sizes().vec();
  shape.back() = lora_B.size(0);
  check_shape(op, "grad_y", grad_y, shape);
  check_device(op, "grad_y", grad_y, "x", x);
  if (y) check_shape(op, "y", *y, shape);
  TORCH_CHECK_VALUE(!want_b || bias, op, ": mask: asks for the gradient of a bias that is None");
  check_shape(op, "h", h, {count_tokens(x), lora_A.size(0)});
}

inline void check_adapter_backward(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B,
                                   const Tensor& norm, const Tensor& gain, const OptionalTensor& bias, double scaling,
                                   int64_t mask, std::optional<at::ScalarType> magnitude_dtype) {
  const char* op = "dora_ext::adapter_backward";
  check_float(op, "grad", grad);
  check_dim(op, "grad", grad, 2);
  check_float(op, "lora_B", lora_B);
  check_dim(op, "lora_B", lora_B, 2);
  const int64_t tokens = grad.size(0), out = grad.size(1);
  check_shape(op, "lora_B", lora_B, {out, lora_B.size(1)});
  check_shape(op, "h", h, {tokens, lora_B.size(1)});
  if (y) check_shape(op, "y", *y, {tokens, out});
  const auto check_same = [&](const char* name, const Tensor& t) {
    TORCH_CHECK_TYPE(t.scalar_type() == grad.scalar_type(), op, ": ", name, ": expected the dtype of grad, ",
                     grad.scalar_type(), ", got ", t.scalar_type());
    check_device(op, name, t, "grad", grad);
  };
  check_same("h", h);
  if (y) check_same("y", *y);
  check_device(op, "lora_B", lora_B, "grad", grad);
  check_feature(op, "norm", norm, out, grad);
  check_feature(op, "gain", gain, out, grad);
  if (bias) check_feature(op, "bias", *bias, out, grad);
  if (magnitude_dtype) check_float(op, "magnitude_dtype", *magnitude_dtype);
  check_scaling(op, scaling);
  TORCH_CHECK_VALUE(y || !(mask & kWantMagnitude), op, ": y: expected a tensor, as mask asks for grad_magnitude");
}

}  // namespace dora_ext
