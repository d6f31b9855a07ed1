// One argument check per op, used by every backend. Each message names the argument, what was expected and what came.
// Templates over the tensor would not help: the faces hold at::Tensor, the kernels hold pointers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>
#include <string>

namespace dora_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Numbers go into messages as finished text: some CUDA libraries bring a C++ runtime of their own, and where its
// std::ostream is found first, formatting a number there crashes the process.
inline std::string text(int64_t n) {
  return std::to_string(n);
}
inline std::string text(double n) {
  return std::to_string(n);
}
inline std::string text(at::IntArrayRef shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + "]";
}

// Accumulators and everything per feature: fp64 for fp64 inputs, else fp32.
inline at::ScalarType accumulate_type(at::ScalarType t) {
  return t == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool is_half(at::ScalarType t) {
  return t == at::kHalf || t == at::kBFloat16;
}

inline void check_float(const char* op, const char* name, at::ScalarType d) {
  TORCH_CHECK_TYPE(d == at::kFloat || d == at::kDouble || d == at::kHalf || d == at::kBFloat16, op, ": ", name,
                   ": expected bfloat16, float16, float32 or float64, got ", d);
}
inline void check_float(const char* op, const char* name, const Tensor& t) {
  check_float(op, name, t.scalar_type());
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  TORCH_CHECK_VALUE(t.dim() == dim, op, ": ", name, ": expected ", text(dim), " dimensions, got shape ",
                    text(t.sizes()));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, op, ": ", name, ": expected shape ", text(shape), ", got ", text(t.sizes()));
}

// Every tensor of a call lives where `first` lives.
inline void check_device(const char* op, const char* name, const Tensor& t, const char* first_name,
                         const Tensor& first) {
  TORCH_CHECK_VALUE(t.device() == first.device(), op, ": ", name, ": expected it on ", first.device(), " like ",
                    first_name, ", got ", t.device());
}

inline void check_scaling(const char* op, double scaling) {
  TORCH_CHECK_VALUE(std::isfinite(scaling), op, ": scaling: expected a finite number, got ", text(scaling));
}

// The adapter of a W of `shape`, (out, in) or (in, out): A (r, in), B (out, r); throws on the first misfit.
inline void check_factors(const char* op, at::IntArrayRef shape, const Tensor& weight, const Tensor& lora_A,
                          const Tensor& lora_B, double scaling, bool transposed) {
  check_float(op, "lora_A", lora_A);
  check_float(op, "lora_B", lora_B);
  check_dim(op, "lora_A", lora_A, 2);
  check_dim(op, "lora_B", lora_B, 2);
  const int64_t out = shape[transposed ? 1 : 0], in = shape[transposed ? 0 : 1], r = lora_A.size(0);
  TORCH_CHECK_VALUE(r > 0, op, ": lora_A: expected a rank of at least 1, got shape ", text(lora_A.sizes()));
  TORCH_CHECK_VALUE(lora_A.size(1) == in, op, ": lora_A: expected shape (r, ", text(in), ") for weight of shape ",
                    text(shape), ", got ", text(lora_A.sizes()));
  TORCH_CHECK_VALUE(lora_B.size(0) == out && lora_B.size(1) == r, op, ": lora_B: expected shape (", text(out), ", ",
                    text(r), ") for weight of shape ", text(shape), " and lora_A of shape ", text(lora_A.sizes()),
                    ", got ", text(lora_B.sizes()));
  check_device(op, "lora_A", lora_A, "weight", weight);
  check_device(op, "lora_B", lora_B, "weight", weight);
  check_scaling(op, scaling);
}

inline void check_adapter(const char* op, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                          double scaling, bool transposed) {
  check_float(op, "weight", weight);
  check_dim(op, "weight", weight, 2);
  check_factors(op, weight.sizes(), weight, lora_A, lora_B, scaling, transposed);
}

// magnitude, norm, gain, bias: one number per output feature.
inline void check_feature(const char* op, const char* name, const Tensor& t, int64_t out, const Tensor& like) {
  check_float(op, name, t);
  check_shape(op, name, t, {out});
  check_device(op, name, t, "the weight", like);
}

inline void check_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
                       double scaling, bool transposed) {
  check_adapter("dora_ext::norm", weight, lora_A, lora_B, scaling, transposed);
  check_feature("dora_ext::norm", "magnitude", magnitude, lora_B.size(0), weight);
}

// What norm_cached and norm_nf4_cached keep between calls.
inline void check_cached(const char* op, const Tensor& cached, const Tensor& fingerprint, const Tensor& weight,
                         at::ScalarType dtype, int64_t out) {
  check_feature(op, "cached", cached, out, weight);
  TORCH_CHECK_TYPE(cached.scalar_type() == dtype && cached.is_contiguous(), op, ": cached: expected contiguous ", dtype,
                   ", got ", cached.scalar_type());
  check_shape(op, "fingerprint", fingerprint, {4});
  TORCH_CHECK_TYPE(fingerprint.scalar_type() == at::kLong, op, ": fingerprint: expected int64, got ",
                   fingerprint.scalar_type());
  check_device(op, "fingerprint", fingerprint, "weight", weight);
}

inline void check_norm_cached(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
                              double scaling, bool transposed, const Tensor& cached, const Tensor& fingerprint) {
  check_norm(weight, lora_A, lora_B, magnitude, scaling, transposed);
  check_cached("dora_ext::norm_cached", cached, fingerprint, weight, accumulate_type(weight.scalar_type()),
               lora_B.size(0));
}

// The output-shaped tensor `t` (…, out) or (batch, out, …) and what goes with it; returns the number of features.
inline int64_t check_features_dim(const char* op, const char* name, const Tensor& t, bool channels_first) {
  check_float(op, name, t);
  TORCH_CHECK_VALUE(t.dim() >= (channels_first ? 2 : 1), op, ": ", name, ": expected at least ",
                    text(int64_t{channels_first ? 2 : 1}), " dimensions, got shape ", text(t.sizes()));
  return t.size(channels_first ? 1 : t.dim() - 1);
}

inline void check_compose(const Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain,
                          const OptionalTensor& bias, double scaling, bool channels_first) {
  const char* op = "dora_ext::compose";
  const int64_t out = check_features_dim(op, "base", base, channels_first);
  check_float(op, "h", h);
  check_float(op, "lora_B", lora_B);
  check_dim(op, "lora_B", lora_B, 2);
  auto expected = base.sizes().vec();
  expected[channels_first ? 1 : expected.size() - 1] = lora_B.size(1);
  check_shape(op, "h", h, expected);
  TORCH_CHECK_VALUE(lora_B.size(0) == out, op, ": lora_B: expected shape (", text(out), ", r), got ",
                    text(lora_B.sizes()));
  TORCH_CHECK_TYPE(h.scalar_type() == base.scalar_type(), op, ": h: expected the dtype of base, ", base.scalar_type(),
                   ", got ", h.scalar_type());
  check_device(op, "h", h, "base", base);
  check_device(op, "lora_B", lora_B, "base", base);
  check_feature(op, "gain", gain, out, base);
  if (bias) check_feature(op, "bias", *bias, out, base);
  check_scaling(op, scaling);
}

inline void check_compose_backward(const Tensor& grad, const Tensor& saved, const Tensor& norm, const Tensor& gain,
                                   const OptionalTensor& bias, bool channels_first) {
  const char* op = "dora_ext::compose_backward";
  const int64_t out = check_features_dim(op, "grad", grad, channels_first);
  check_shape(op, "saved", saved, grad.sizes());
  TORCH_CHECK_TYPE(saved.scalar_type() == grad.scalar_type(), op, ": saved: expected the dtype of grad, ",
                   grad.scalar_type(), ", got ", saved.scalar_type());
  check_device(op, "saved", saved, "grad", grad);
  check_feature(op, "norm", norm, out, grad);
  check_feature(op, "gain", gain, out, grad);
  if (bias) check_feature(op, "bias", *bias, out, grad);
}

// W of `shape`, (out, in), in x's dtype, which `weight` holds in some form.
inline void check_recover_operands(const char* op, const Tensor& grad_magnitude, const Tensor& grad_y, const Tensor& x,
                                   const Tensor& h, at::IntArrayRef shape, const Tensor& weight, const Tensor& lora_B,
                                   const Tensor& norm, const Tensor& gain, double scaling) {
  check_float(op, "x", x);
  check_float(op, "lora_B", lora_B);
  check_dim(op, "lora_B", lora_B, 2);
  check_float(op, "grad_y", grad_y);
  check_dim(op, "grad_y", grad_y, 2);
  const int64_t out = shape[0], tokens = grad_y.size(0), r = lora_B.size(1);
  check_shape(op, "grad_y", grad_y, {tokens, out});
  check_shape(op, "x", x, {tokens, shape[1]});
  check_shape(op, "h", h, {tokens, r});
  check_shape(op, "lora_B", lora_B, {out, r});
  TORCH_CHECK_TYPE(h.scalar_type() == x.scalar_type(), op, ": h: expected the dtype of x, ", x.scalar_type(), ", got ",
                   h.scalar_type());
  check_feature(op, "grad_magnitude", grad_magnitude, out, weight);
  check_device(op, "grad_y", grad_y, "weight", weight);
  check_device(op, "x", x, "weight", weight);
  check_device(op, "h", h, "weight", weight);
  check_device(op, "lora_B", lora_B, "weight", weight);
  check_feature(op, "norm", norm, out, weight);
  check_feature(op, "gain", gain, out, weight);
  check_scaling(op, scaling);
}

inline void check_magnitude_grad_recover(const Tensor& grad_magnitude, const Tensor& grad_y, const Tensor& x,
                                         const Tensor& h, const Tensor& weight, const Tensor& lora_B,
                                         const Tensor& norm, const Tensor& gain, double scaling, bool transposed) {
  const char* op = "dora_ext::magnitude_grad_recover_";
  check_float(op, "weight", weight);
  check_dim(op, "weight", weight, 2);
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), op, ": x: expected the dtype of weight, ",
                   weight.scalar_type(), ", got ", x.scalar_type());
  const int64_t shape[2] = {weight.size(transposed ? 1 : 0), weight.size(transposed ? 0 : 1)};
  check_recover_operands(op, grad_magnitude, grad_y, x, h, shape, weight, lora_B, norm, gain, scaling);
}

inline void check_embedding(const char* op, const Tensor& ids, const Tensor& weight, const Tensor& lora_A,
                            const Tensor& lora_B, const Tensor& gain, double scaling) {
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, op,
                   ": ids: expected int64 or int32, got ", ids.scalar_type());
  check_adapter(op, weight, lora_A, lora_B, scaling, /*transposed=*/true);
  check_device(op, "ids", ids, "weight", weight);
  check_feature(op, "gain", gain, lora_B.size(0), weight);
}

}  // namespace dora_ext

#include "check_nf4.h"
