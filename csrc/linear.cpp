// DoRA's linear layer, whole, composed of library products (aten::mm) and of our own ops; registered once for all
// backends. Symbols as in ops.cpp; tokens are the leading dimensions of x, flattened.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <tuple>

#include "check.h"
#include "cpu/narrow.h"
#include "inside_op.h"

namespace dora_ext {
namespace {

std::tuple<Tensor, Tensor> norm_op(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                   const Tensor& magnitude, double scaling, bool transposed) {
  static auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool)>(
          "dora_ext::norm");
  return op.call(weight, lora_A, lora_B, magnitude, scaling, transposed);
}

void compose_op_(Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain, const OptionalTensor& bias,
                 double scaling) {
  static auto op =
      find_op<void(Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, bool, bool)>(
          "dora_ext::compose_");
  op.call(base, h, lora_B, gain, bias, scaling, /*delta=*/false, /*channels_first=*/false);
}

std::tuple<Tensor, Tensor, Tensor> compose_backward_op(const Tensor& grad, const Tensor& saved, const Tensor& norm,
                                                       const Tensor& gain, const OptionalTensor& bias,
                                                       bool saved_is_output) {
  static auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                              const Tensor&, const OptionalTensor&, bool, bool, bool)>(
      "dora_ext::compose_backward");
  return op.call(grad, saved, norm, gain, bias, saved_is_output, /*delta=*/false, /*channels_first=*/false);
}

void magnitude_grad_recover_op_(Tensor& grad_magnitude, const Tensor& grad_y, const Tensor& x, const Tensor& h,
                                const Tensor& weight, const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                                double scaling, bool transposed) {
  static auto op = find_op<void(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, const Tensor&, double, bool)>("dora_ext::magnitude_grad_recover_");
  op.call(grad_magnitude, grad_y, x, h, weight, lora_B, norm, gain, scaling, transposed);
}

// (..., features) as (tokens, features). Sizes are spelled out, because -1 is ambiguous in an empty batch.
Tensor as_tokens(const Tensor& t) {
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) tokens *= t.size(d);
  return t.reshape({tokens, t.size(-1)});
}

// Where our own loops for narrow matrices beat the library.
bool has_cpu_loops(const Tensor& t) {
  return t.is_cpu() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
}

// scaling * wide (tokens, features) narrow (features, r)
Tensor product_with_narrow(const Tensor& wide, const Tensor& narrow, double scaling = 1) {
  if (has_cpu_loops(wide)) return cpu::multiply_narrow(wide, narrow, scaling);
  if (scaling == 1) return at::mm(wide, narrow);
  return at::empty({wide.size(0), narrow.size(1)}, wide.options()).addmm_(wide, narrow, /*beta=*/0, scaling);
}

// left right, for the gradient of a parameter: in the parameter's dtype, and on CUDA not rounded to half precision on
// the way there. (The CPU has no product with that result; it rounds once.)
Tensor product_for(const Tensor& parameter, const Tensor& left, const Tensor& right) {
  const auto dtype = parameter.scalar_type();
  if (left.is_cuda() && left.scalar_type() != dtype && dtype == at::kFloat) return at::mm(left, right, dtype);
  return at::mm(left, right).to(dtype);
}

// dB = s G^T h
Tensor grad_of_B(const Tensor& lora_B, const Tensor& G, const Tensor& h, double scaling) {
  if (has_cpu_loops(G)) return cpu::multiply_transposed_narrow(G, h, scaling).to(lora_B.scalar_type());
  Tensor grad_B = product_for(lora_B, G.t(), h);
  if (scaling != 1) grad_B.mul_(scaling);
  return grad_B;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                                                          const Tensor& lora_B, const Tensor& magnitude,
                                                          const OptionalTensor& bias, const OptionalTensor& norm,
                                                          const OptionalTensor& gain, double scaling, bool transposed) {
  const char* op = "dora_ext::linear_forward";
  InsideOp guard;
  check_linear(op, x, weight, lora_A, lora_B, magnitude, bias, scaling, transposed);
  TORCH_CHECK_VALUE(norm.has_value() == gain.has_value(), op, ": norm and gain: expected both or neither");
  Tensor n, g;
  if (norm) {
    check_feature(op, "norm", *norm, lora_B.size(0), weight);
    check_feature(op, "gain", *gain, lora_B.size(0), weight);
    // An op whose schema declares no alias must not return its arguments; the caller has them.
    n = at::empty({0}, norm->options());
    g = at::empty({0}, gain->options());
  } else {
    std::tie(n, g) = norm_op(weight, lora_A, lora_B, magnitude, scaling, transposed);
  }
  const Tensor tokens = as_tokens(x);
  const Tensor h = product_with_narrow(tokens, lora_A.to(x.scalar_type()).t());
  const Tensor& used_gain = gain ? *gain : g;
  Tensor y;
  OptionalTensor rest = bias;
  if (bias && x.is_cpu()) {
    // With the bias inside the product, as the base layer has it, an adapter that does nothing yet changes not a bit:
    // g (x W^T + bias) + (1 - g) bias. On CUDA the other order is one launch less.
    y = at::linear(x, transposed ? weight.t() : weight, bias->to(x.scalar_type()))
            .view({tokens.size(0), lora_B.size(0)});
    rest = bias->sub(used_gain.mul(*bias));
  } else {
    y = at::mm(tokens, transposed ? weight : weight.t());
  }
  compose_op_(y, h, lora_B, used_gain, rest, scaling);
  auto shape = x.sizes().vec();
  shape.back() = y.size(1);
  return {y.view(shape), h, n, g};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad_y, const OptionalTensor& y, const Tensor& x, const Tensor& h, const Tensor& weight,
    const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude, const OptionalTensor& bias, const Tensor& norm,
    const Tensor& gain, double scaling, bool transposed, int64_t mask) {
  const char* op = "dora_ext::linear_backward";
  InsideOp guard;
  check_linear(op, x, weight, lora_A, lora_B, magnitude, bias, scaling, transposed);
  auto shape = x.sizes().vec();
  shape.back() = lora_B.size(0);
  check_shape(op, "grad_y", grad_y, shape);
  check_device(op, "grad_y", grad_y, "weight", weight);
  if (y) check_shape(op, "y", *y, shape);
  const bool want_x = mask & 1, want_A = mask & 2, want_B = mask & 4, want_m = mask & 8, want_b = mask & 16;
  TORCH_CHECK_VALUE(!want_b || bias, op, ": mask: asks for the gradient of a bias that is None");

  const auto dtype = x.scalar_type();
  const Tensor tokens = as_tokens(x);
  check_shape(op, "h", h, {tokens.size(0), lora_A.size(0)});
  const Tensor grad = as_tokens(grad_y.to(dtype));
  const Tensor B = lora_B.to(dtype);
  const Tensor none = at::empty({0}, x.options());
  Tensor grad_x = none, grad_A = none, grad_B = none, grad_m = none, grad_b = none;

  // E = dY^T h serves dB = s g * E and the adapter's part of dm, where u cannot be found from y.
  const bool u_from_y = want_m && y;
  Tensor G;
  if (u_from_y) {
    std::tie(G, grad_m, grad_b) = compose_backward_op(grad, as_tokens(*y), norm, gain, bias, true);
    magnitude_grad_recover_op_(grad_m, grad, tokens, h, weight, lora_B, norm, gain, scaling, transposed);
  } else {
    const Tensor base = want_m ? at::mm(tokens, transposed ? weight : weight.t()) : grad;
    std::tie(G, grad_m, grad_b) = compose_backward_op(grad, base, norm, gain, std::nullopt, false);
    if (want_m) {
      const Tensor E = product_for(norm, grad.t(), h);
      grad_m.add_(E.mul(lora_B).sum(1).mul_(scaling).div_(norm).masked_fill_(norm.eq(0), 0));
    }
  }
  grad_m = want_m ? grad_m.to(magnitude.scalar_type()) : none;
  grad_b = want_b ? grad_b.to(bias->scalar_type()) : none;

  Tensor P;
  if (want_x || want_A) P = product_with_narrow(G, B, scaling);
  // The small products first, while G is still in a cache.
  if (want_B) grad_B = grad_of_B(lora_B, G, h, scaling);
  if (want_A) grad_A = product_for(lora_A, P.t(), tokens);
  if (want_x) {
    const Tensor W = transposed ? weight.t() : weight, A = lora_A.to(dtype);
    // On the CPU the large product adds to what is there at no cost; on CUDA it depends, and mostly costs more.
    grad_x = x.is_cpu() ? at::mm(P, A).addmm_(G, W) : at::mm(G, W).addmm_(P, A);
    grad_x = grad_x.view(x.sizes());
  }
  return {grad_x, grad_A, grad_B, grad_m, grad_b};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("linear_forward", linear_forward);
  m.impl("linear_backward", linear_backward);
}

}  // namespace dora_ext
