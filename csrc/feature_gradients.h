// feature_gradients: what is made by output feature of E = dY^T h, once a layer's backward pass has it: the gradient of
// B, the adapter's part of the magnitude's, and s g B. Symbols as in ops.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "check.h"

namespace dora_ext {

using OptionalDtype = std::optional<at::ScalarType>;
inline OptionalDtype dtype_if(bool wanted, at::ScalarType dtype) {
  return wanted ? OptionalDtype(dtype) : std::nullopt;
}

using FeatureGradients = std::tuple<Tensor, Tensor, Tensor>;  // grad_B, grad_magnitude, scaled_B

// Through the dispatcher.
FeatureGradients feature_gradients_op(const OptionalTensor& E, const Tensor& lora_B, const Tensor& norm,
                                      const Tensor& gain, const OptionalTensor& grad_magnitude, double scaling,
                                      bool want_B, OptionalDtype magnitude_dtype, OptionalDtype scaled_dtype);

inline void check_feature_gradients(const OptionalTensor& E, const Tensor& lora_B, const Tensor& norm,
                                    const Tensor& gain, const OptionalTensor& grad_magnitude, double scaling,
                                    bool want_B, OptionalDtype magnitude_dtype, OptionalDtype scaled_dtype) {
  const char* op = "dora_ext::feature_gradients";
  check_float(op, "lora_B", lora_B);
  TORCH_CHECK_VALUE(lora_B.dim() >= 2 && lora_B.numel() == lora_B.size(0) * lora_B.size(1), op,
                    ": lora_B: expected shape (out, r) or (out, r, 1, ...), got ", text(lora_B.sizes()));
  const int64_t out = lora_B.size(0);
  TORCH_CHECK_VALUE(E || !(want_B || magnitude_dtype), op,
                    ": E: expected a tensor, as the gradient of lora_B or of the magnitude is asked for");
  if (E) {
    check_float(op, "E", *E);
    check_shape(op, "E", *E, {out, lora_B.size(1)});
    check_device(op, "E", *E, "lora_B", lora_B);
  }
  check_feature(op, "norm", norm, out, lora_B);
  check_feature(op, "gain", gain, out, lora_B);
  if (grad_magnitude) check_feature(op, "grad_magnitude", *grad_magnitude, out, lora_B);
  if (magnitude_dtype) check_float(op, "magnitude_dtype", *magnitude_dtype);
  if (scaled_dtype) check_float(op, "scaled_dtype", *scaled_dtype);
  check_scaling(op, scaling);
}

}  // namespace dora_ext
