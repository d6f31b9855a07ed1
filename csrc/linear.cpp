// DoRA's linear layer, whole, composed of products (layer_products.h) and of our own ops; registered once for all
// backends. Symbols as in ops.cpp; tokens are the leading dimensions of x, flattened.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "adapter_backward.h"
#include "aligned.h"
#include "check_decode.h"
#include "check_linear.h"
#include "factors.h"
#include "feature_gradients.h"
#include "inside_op.h"
#include "layer_products.h"
#include "products.h"

namespace dora_ext {
namespace {

std::tuple<Tensor, Tensor> norm_op(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                   const Tensor& magnitude, double scaling, bool transposed) {
  static auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool)>(
          "dora_ext::norm");
  return op.call(weight, lora_A, lora_B, magnitude, scaling, transposed);
}

std::tuple<Tensor, Tensor> norm_cached_op(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                          const Tensor& magnitude, double scaling, bool transposed,
                                          const KeptNorms& kept) {
  static auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool,
                                         Tensor&, Tensor&, int64_t)>("dora_ext::norm_cached");
  return op.call(weight, lora_A, lora_B, magnitude, scaling, transposed, kept.cached, kept.fingerprint, kept.epoch);
}

std::tuple<Tensor, Tensor> decode_op(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                     const Tensor& gain, const OptionalTensor& bias, double scaling) {
  static auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const OptionalTensor&, double)>("dora_ext::linear_decode");
  return op.call(x, weight, lora_A, lora_B, gain, bias, scaling);
}

void magnitude_grad_recover_op_(Tensor& grad_magnitude, const Tensor& grad_y, const Tensor& x, const Tensor& h,
                                const Tensor& weight, const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                                double scaling, bool transposed, bool beside) {
  static auto op = find_op<void(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                const Tensor&, const Tensor&, double, bool, bool)>("dora_ext::magnitude_grad_recover_");
  op.call(grad_magnitude, grad_y, x, h, weight, lora_B, norm, gain, scaling, transposed, beside);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const char* op, const Tensor& x, const Tensor& weight, Tensor lora_A,
                                                   Tensor lora_B, const Tensor& magnitude, const OptionalTensor& bias,
                                                   const OptionalTensor& gain, double scaling, bool transposed,
                                                   const KeptNorms* kept) {
  InsideOp guard;
  check_linear(op, x, weight, lora_A, lora_B, magnitude, bias, scaling, transposed);
  if (gain) check_feature(op, "gain", *gain, lora_B.size(0), weight);
  const Tensor tokens = as_tokens(x);
  const bool decodes = !transposed && decode_fits(tokens, weight);
  const bool one_op = !gain && !transposed && !decodes && one_forward_with_norms(tokens, weight, lora_A);
  // Once, for whoever needs them so; decoding does not.
  if (!one_op && !decodes && cast_factors_fits(lora_A, lora_B, x.scalar_type())) {
    std::tie(lora_A, lora_B) = cast_factors(lora_A, lora_B, x.scalar_type());
  }
  Tensor y, h, n, g;
  if (one_op) {
    std::tie(y, h, n, g) = forward_products_with_norms(tokens, weight, lora_A, lora_B, magnitude, bias, scaling, kept);
  } else if (gain) {
    // An op whose schema declares no alias must not return its arguments; the caller has them.
    n = at::empty({0}, gain->options());
    g = at::empty({0}, gain->options());
  } else {
    std::tie(n, g) = kept == nullptr ? norm_op(weight, lora_A, lora_B, magnitude, scaling, transposed)
                                     : norm_cached_op(weight, lora_A, lora_B, magnitude, scaling, transposed, *kept);
  }
  if (!y.defined()) {
    const Tensor& used_gain = gain ? *gain : g;
    std::tie(y, h) = decodes ? decode_op(tokens, weight, lora_A, lora_B, used_gain, bias, scaling)
                             : forward_products(tokens, weight, transposed, lora_A, lora_B, used_gain, bias, scaling);
  }
  auto shape = x.sizes().vec();
  shape.back() = y.size(1);
  return {in_shape(y, shape), h, n, g};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                                                          const Tensor& lora_B, const Tensor& magnitude,
                                                          const OptionalTensor& bias, const OptionalTensor& norm,
                                                          const OptionalTensor& gain, double scaling, bool transposed) {
  const char* op = "dora_ext::linear_forward";
  TORCH_CHECK_VALUE(norm.has_value() == gain.has_value(), op, ": norm and gain: expected both or neither");
  if (norm) check_feature(op, "norm", *norm, lora_B.size(0), weight);
  return forward(op, x, weight, lora_A, lora_B, magnitude, bias, gain, scaling, transposed, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_forward_cached(const Tensor& x, const Tensor& weight,
                                                                 const Tensor& lora_A, const Tensor& lora_B,
                                                                 const Tensor& magnitude, const OptionalTensor& bias,
                                                                 double scaling, bool transposed, Tensor& cached,
                                                                 Tensor& fingerprint, int64_t epoch) {
  const KeptNorms kept{cached, fingerprint, epoch};
  return forward("dora_ext::linear_forward_cached", x, weight, lora_A, lora_B, magnitude, bias, std::nullopt, scaling,
                 transposed, &kept);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_backward(
    const Tensor& grad_y, const OptionalTensor& y, const Tensor& x, const Tensor& h, const Tensor& weight,
    const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude, const OptionalTensor& bias, const Tensor& norm,
    const Tensor& gain, double scaling, bool transposed, int64_t mask) {
  const char* op = "dora_ext::linear_backward";
  InsideOp guard;
  const bool want_x = mask & 1, want_A = mask & 2, want_B = mask & 4, want_m = mask & 8, want_b = mask & 16;
  check_linear_backward(op, grad_y, y, x, h, weight, lora_A, lora_B, magnitude, bias, scaling, transposed, want_b);

  const auto dtype = x.scalar_type();
  const Tensor tokens = as_tokens(x);
  const Tensor grad = as_tokens(in_dtype(grad_y, dtype));
  const Tensor n = in_dtype(norm, accumulate_type(dtype));        // NF4's are fp32, also where x is fp64
  const auto none = [&] { return at::empty({0}, x.options()); };  // one for each: results must not share memory
  Tensor G, P, W, grad_x, grad_A, grad_B, grad_m, grad_b;
  // At a large rank dB is what would raise the peak, beside G: it waits until G is gone.
  const bool late_B = want_B && (y || !want_m) && x.is_cuda() && is_half(dtype) && !one_pass_rank(lora_A.size(0));
  const bool scaled = want_x && !transposed && (y || !want_m) && scaled_weight_pays(tokens, weight, lora_A.size(0));

  bool one_pass = false;
  if (y || !want_m) {
    // First, so that the large product may begin beside the launches that add up what the pass has summed.
    if (want_x) W = scaled ? scaled_weight(weight, gain) : weight;
    const int64_t wanted = (want_x && !scaled ? kWantG : 0) | (want_x || want_A ? kWantP : 0) |
                           (want_B && !late_B ? kWantB : 0) | (want_m ? kWantMagnitude : 0) | (want_b ? kWantBias : 0);
    const OptionalTensor saved = want_m ? OptionalTensor(as_tokens(*y)) : std::nullopt;
    one_pass = adapter_backward_in_one_pass(grad, saved, h, lora_B);
    std::tie(G, P, grad_B, grad_m, grad_b) =
        adapter_backward_op(grad, saved, h, lora_B, n, gain, bias, scaling, wanted, magnitude.scalar_type());
    if (want_m) {
      magnitude_grad_recover_op_(grad_m, grad, tokens, h, weight, lora_B, n, gain, scaling, transposed, one_pass);
    }
  } else {
    W = weight;
    // u once more; E = dY^T h is the adapter's part of it.
    const Tensor base = product(tokens, transposed ? weight : weight.t());
    std::tie(G, grad_m, grad_b) = compose_backward_op(grad, base, n, gain, std::nullopt, /*saved_is_output=*/false,
                                                      /*want_G=*/want_x, std::nullopt);
    const Tensor E = grad_of_B(n, grad, h, /*scaling=*/1);
    Tensor scaled_B;
    std::tie(grad_B, grad_m, scaled_B) = feature_gradients_op(
        E, lora_B, n, gain, grad_m, scaling, want_B, magnitude.scalar_type(), dtype_if(want_x || want_A, dtype));
    if (want_x || want_A) P = product_with_narrow(grad, scaled_B);
  }
  if (want_x) {
    std::tie(grad_x, grad_A) =
        backward_products(scaled ? grad : std::move(G), W, transposed, P, lora_A, tokens, want_A, one_pass);
    grad_x = in_shape(grad_x, x.sizes());
  } else if (want_A) {
    grad_A = grad_of_A(lora_A, P, tokens);
  }
  if (late_B) {
    const Tensor E = grad_of_B(n, grad, h, /*scaling=*/1);
    grad_B = std::get<0>(feature_gradients_op(E, lora_B, n, gain, std::nullopt, scaling, /*want_B=*/true,
                                              /*magnitude_dtype=*/std::nullopt, /*scaled_dtype=*/std::nullopt));
  }
  return {want_x ? grad_x : none(), want_A ? grad_A : none(), want_B ? grad_B : none(),
          want_m ? in_dtype(grad_m, magnitude.scalar_type()) : none(),
          want_b ? in_dtype(grad_b, bias->scalar_type()) : none()};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("linear_forward", linear_forward);
  m.impl("linear_forward_cached", linear_forward_cached);
  m.impl("linear_backward", linear_backward);
}

}  // namespace dora_ext
