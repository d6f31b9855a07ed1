// feature_gradients, composed; registered for all backends. On CUDA one launch takes its place.
#include "feature_gradients.h"

#include <ATen/ops/addcdiv.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "aligned.h"
#include "inside_op.h"

namespace dora_ext {
namespace {

FeatureGradients feature_gradients(const OptionalTensor& E, const Tensor& lora_B, const Tensor& norm,
                                   const Tensor& gain, const OptionalTensor& grad_magnitude, double scaling,
                                   bool want_B, OptionalDtype magnitude_dtype, OptionalDtype scaled_dtype) {
  InsideOp guard;
  check_feature_gradients(E, lora_B, norm, gain, grad_magnitude, scaling, want_B, magnitude_dtype, scaled_dtype);
  const at::IntArrayRef shape = lora_B.sizes().slice(0, 2);
  const Tensor B = lora_B.dim() == 2 ? lora_B : lora_B.reshape(shape);
  const auto accumulate = accumulate_type(norm.scalar_type());
  // s g t, rounded once.
  Tensor scale;
  const auto scaled = [&](const Tensor& t, at::ScalarType dtype) {
    if (!scale.defined()) scale = in_dtype(gain, accumulate).mul(scaling).unsqueeze(1);
    Tensor result = at::empty(shape, lora_B.options().dtype(dtype));
    return at::mul_out(result, t, scale);
  };
  // One for each: results must not share memory.
  const auto none = [&] { return at::empty({0}, norm.options()); };
  Tensor grad_m;
  if (magnitude_dtype) {
    const Tensor n = in_dtype(norm, accumulate);
    const Tensor base = grad_magnitude ? in_dtype(*grad_magnitude, accumulate) : at::zeros_like(n);
    const Tensor of_adapter = in_dtype(*E, accumulate).mul(B).sum(1);
    // What is divided by 0 is 0: of such a feature there is nothing.
    grad_m = at::addcdiv(base, of_adapter, n, scaling).masked_fill_(n.eq(0), 0);
  }
  return {want_B ? in_shape(scaled(*E, lora_B.scalar_type()), lora_B.sizes()) : none(),
          magnitude_dtype ? in_dtype(grad_m, *magnitude_dtype) : none(),
          scaled_dtype ? scaled(B, *scaled_dtype) : none()};
}

}  // namespace

FeatureGradients feature_gradients_op(const OptionalTensor& E, const Tensor& lora_B, const Tensor& norm,
                                      const Tensor& gain, const OptionalTensor& grad_magnitude, double scaling,
                                      bool want_B, OptionalDtype magnitude_dtype, OptionalDtype scaled_dtype) {
  static auto op = find_op<FeatureGradients(const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                                            const OptionalTensor&, double, bool, OptionalDtype, OptionalDtype)>(
      "dora_ext::feature_gradients");
  return op.call(E, lora_B, norm, gain, grad_magnitude, scaling, want_B, magnitude_dtype, scaled_dtype);
}

TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("feature_gradients", feature_gradients);
}

}  // namespace dora_ext
