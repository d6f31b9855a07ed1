// adapter_backward, composed; registered for all backends. One that does it in fewer passes takes its place.
#include "adapter_backward.h"

#include <torch/library.h>

#include "check_linear.h"
#include "inside_op.h"
#include "products.h"

namespace dora_ext {
namespace {

AdapterGradients adapter_backward(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B,
                                  const Tensor& norm, const Tensor& gain, const OptionalTensor& bias, double scaling,
                                  int64_t mask, std::optional<at::ScalarType> magnitude_dtype) {
  check_adapter_backward(grad, y, h, lora_B, norm, gain, bias, scaling, mask, magnitude_dtype);
  return adapter_backward_composed(grad, y, h, lora_B, norm, gain, bias, scaling, mask, magnitude_dtype);
}

}  // namespace

AdapterGradients adapter_backward_op(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B,
                                     const Tensor& norm, const Tensor& gain, const OptionalTensor& bias, double scaling,
                                     int64_t mask, std::optional<at::ScalarType> magnitude_dtype) {
  static auto op =
      find_op<AdapterGradients(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&, const OptionalTensor&, double, int64_t, std::optional<at::ScalarType>)>(
          "dora_ext::adapter_backward");
  return op.call(grad, y, h, lora_B, norm, gain, bias, scaling, mask, magnitude_dtype);
}

bool adapter_backward_in_one_pass(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B) {
  static auto op = find_op<bool(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&)>(
      "dora_ext::adapter_backward_in_one_pass");
  return grad.is_cuda() && op.call(grad, y, h, lora_B);
}

std::tuple<Tensor, Tensor, Tensor> compose_backward_op(const Tensor& grad, const Tensor& saved, const Tensor& norm,
                                                       const Tensor& gain, const OptionalTensor& bias,
                                                       bool saved_is_output, bool want_G,
                                                       std::optional<at::ScalarType> magnitude_dtype) {
  static auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, bool, bool, bool, bool,
      std::optional<at::ScalarType>)>("dora_ext::compose_backward");
  return op.call(grad, saved, norm, gain, bias, saved_is_output, /*delta=*/false, /*channels_first=*/false, want_G,
                 magnitude_dtype);
}

AdapterGradients adapter_backward_composed(const Tensor& grad, const OptionalTensor& y, const Tensor& h,
                                           const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                                           const OptionalTensor& bias, double scaling, int64_t mask,
                                           std::optional<at::ScalarType> magnitude_dtype) {
  InsideOp guard;
  // One for each: results must not share memory.
  const auto none = [&] { return at::empty({0}, grad.options()); };
  const auto [G, grad_m, grad_b] =
      compose_backward_op(grad, y ? *y : grad, norm, gain, y ? bias : std::nullopt, y.has_value(),
                          mask & (kWantG | kWantP | kWantB), magnitude_dtype);
  return {mask & kWantG ? G : none(),
          mask & kWantP ? product_with_narrow(G, in_dtype(lora_B, grad.scalar_type()), scaling) : none(),
          mask & kWantB ? grad_of_B(lora_B, G, h, scaling) : none(), mask & kWantMagnitude ? grad_m : none(),
          mask & kWantBias ? grad_b : none()};
}

TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("adapter_backward", adapter_backward);
}

}  // namespace dora_ext
