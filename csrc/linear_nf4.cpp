// DoRA's linear layer over a W packed in NF4: unpacked once in each direction, and gone when the op returns. The rest
// is linear.cpp's. Registered once for all backends; one that multiplies packed weights itself takes its place.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "adapter_backward.h"
#include "aligned.h"
#include "check_decode.h"
#include "check_linear.h"
#include "inside_op.h"
#include "layer_products.h"
#include "products.h"

namespace dora_ext {
namespace {

// W (out, in) in `to`: the values that it has in `dtype`, cast.
Tensor unpack(const Tensor& packed, const Tensor& absmax, int64_t blocksize, c10::SymIntArrayRef shape,
              at::ScalarType dtype, const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
              const OptionalTensor& offset, int64_t nested_blocksize, at::ScalarType to,
              const OptionalTensor& row_gain = std::nullopt) {
  static auto op =
      find_op<Tensor(const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef, at::ScalarType, const OptionalTensor&,
                     const OptionalTensor&, const OptionalTensor&, int64_t, const OptionalTensor&)>(
          "dora_ext::dequantize_nf4");
  // Rounded once from fp32, so that this equals fp32 values that are rounded afterwards.
  const bool direct = dtype == at::kFloat && is_half(to);
  return in_dtype(op.call(packed, absmax, blocksize, shape, direct ? to : dtype, nested_absmax, nested_code, offset,
                          nested_blocksize, row_gain),
                  to);
}

std::tuple<Tensor, Tensor, Tensor> linear_nf4_forward(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                                      int64_t blocksize, c10::SymIntArrayRef shape,
                                                      at::ScalarType dtype, const OptionalTensor& nested_absmax,
                                                      const OptionalTensor& nested_code, const OptionalTensor& offset,
                                                      int64_t nested_blocksize, const Tensor& lora_A,
                                                      const Tensor& lora_B, const Tensor& magnitude,
                                                      const OptionalTensor& bias, const Tensor& norm,
                                                      const Tensor& gain, double scaling, const OptionalTensor& rest) {
  const char* name = "dora_ext::linear_nf4_forward";
  static auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, double, bool)>("dora_ext::linear_forward");
  InsideOp guard;
  check_float(name, "x", x);
  if (!rest && shape.size() == 2 && x.dim() > 0) {
    const Tensor tokens = as_tokens(x);
    if (decode_nf4_fits(tokens, packed, blocksize, C10_AS_INTARRAYREF_SLOW(shape), dtype)) {
      static auto decode = find_op<std::tuple<Tensor, Tensor>(
          const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef, at::ScalarType,
          const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t, const Tensor&, const Tensor&,
          const Tensor&, const OptionalTensor&, double)>("dora_ext::linear_decode_nf4");
      const auto [y, h] = decode.call(tokens, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code,
                                      offset, nested_blocksize, lora_A, lora_B, gain, bias, scaling);
      auto sizes = x.sizes().vec();
      sizes.back() = y.size(1);
      return {y.view(sizes), h, at::empty({0}, y.options())};
    }
  }
  const Tensor W = unpack(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                          x.scalar_type());
  const auto [y, h, n, g] = op.call(x, W, lora_A, lora_B, magnitude, bias, norm, gain, scaling, false);
  if (!rest) return {y, h, at::empty({0}, y.options())};
  check_shape(name, "rest", *rest, x.sizes());
  const Tensor total = at::addmm(as_tokens(y), as_tokens(*rest), W.t());
  return {y, h, total.view(y.sizes())};
}

using Nf4Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// On CUDA dX = [dY | P] [g W ; A], with g multiplied while W is unpacked: no G, which is a pass and an output's memory.
// The values of W must be those of x's dtype, or else g W would be rounded to another one.
bool gain_goes_into_weight(const Tensor& x, const OptionalTensor& y, at::ScalarType dtype, int64_t mask) {
  return x.is_cuda() && is_half(x.scalar_type()) && (dtype == at::kFloat || dtype == x.scalar_type()) &&
         (y || !(mask & 8)) && !(mask & 32);
}

Nf4Gradients backward_with_gain_in_weight(const Tensor& grad_y, const OptionalTensor& y, const Tensor& x,
                                          const Tensor& h, const Tensor& packed, const Tensor& absmax,
                                          int64_t blocksize, c10::SymIntArrayRef shape, at::ScalarType dtype,
                                          const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                                          const OptionalTensor& offset, int64_t nested_blocksize, const Tensor& lora_A,
                                          const Tensor& lora_B, const Tensor& magnitude, const OptionalTensor& bias,
                                          const Tensor& norm, const Tensor& gain, double scaling, int64_t mask) {
  const char* name = "dora_ext::linear_nf4_backward";
  static auto recover =
      find_op<void(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                   c10::SymIntArrayRef, at::ScalarType, const OptionalTensor&, const OptionalTensor&,
                   const OptionalTensor&, int64_t, const Tensor&, const Tensor&, const Tensor&, double, bool)>(
          "dora_ext::magnitude_grad_recover_nf4_");
  const bool want_x = mask & 1, want_A = mask & 2, want_B = mask & 4, want_m = mask & 8, want_b = mask & 16;
  const auto to = x.scalar_type();
  // Of W's shape, and without its memory: for the checks.
  const Tensor like = at::empty({1}, x.options()).expand_symint(shape);
  check_linear_backward(name, grad_y, y, x, h, like, lora_A, lora_B, magnitude, bias, scaling, false, want_b);
  check_device(name, "packed", packed, "x", x);

  const Tensor tokens = as_tokens(x), grad = as_tokens(in_dtype(grad_y, to));
  const int64_t wanted = (want_x || want_A ? kWantP : 0) | (want_B ? kWantB : 0) | (want_m ? kWantMagnitude : 0) |
                         (want_b ? kWantBias : 0);
  const OptionalTensor saved = want_m ? OptionalTensor(as_tokens(*y)) : std::nullopt;
  const bool one_pass = adapter_backward_in_one_pass(grad, saved, h, lora_B);
  Tensor W;
  const auto unpack_W = [&] {
    W = unpack(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize, to,
               in_dtype(gain, at::kFloat));
  };
  // First, so that the product may begin beside the launches that add up what the pass over dY has summed.
  if (want_x && one_pass) unpack_W();
  auto [G, P, grad_B, grad_m, grad_b] =
      adapter_backward_op(grad, saved, h, lora_B, norm, gain, bias, scaling, wanted, magnitude.scalar_type());
  if (want_m) {
    recover.call(grad_m, grad, tokens, h, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset,
                 nested_blocksize, lora_B, norm, gain, scaling, one_pass);
  }
  const auto none = [&] { return at::empty({0}, x.options()); };
  Tensor grad_x = none(), grad_A = none();
  if (want_x) {
    if (!one_pass) unpack_W();
    const auto [dX, dA] = backward_products(grad, W, false, P, lora_A, tokens, want_A, one_pass);
    grad_x = in_shape(dX, x.sizes());
    if (want_A) grad_A = dA;
  } else if (want_A) {
    grad_A = grad_of_A(lora_A, P, tokens);
  }
  return {grad_x,
          grad_A,
          want_B ? grad_B : none(),
          want_m ? in_dtype(grad_m, magnitude.scalar_type()) : none(),
          want_b ? in_dtype(grad_b, bias->scalar_type()) : none(),
          none()};
}

Nf4Gradients linear_nf4_backward(const Tensor& grad_y, const OptionalTensor& y, const Tensor& x, const Tensor& h,
                                 const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                 c10::SymIntArrayRef shape, at::ScalarType dtype, const OptionalTensor& nested_absmax,
                                 const OptionalTensor& nested_code, const OptionalTensor& offset,
                                 int64_t nested_blocksize, const Tensor& lora_A, const Tensor& lora_B,
                                 const Tensor& magnitude, const OptionalTensor& bias, const Tensor& norm,
                                 const Tensor& gain, double scaling, int64_t mask) {
  static auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, double, bool, int64_t)>(
      "dora_ext::linear_backward");
  InsideOp guard;
  if (gain_goes_into_weight(x, y, dtype, mask)) {
    return backward_with_gain_in_weight(grad_y, y, x, h, packed, absmax, blocksize, shape, dtype, nested_absmax,
                                        nested_code, offset, nested_blocksize, lora_A, lora_B, magnitude, bias, norm,
                                        gain, scaling, mask);
  }
  const Tensor W = unpack(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                          x.scalar_type());
  const auto [dx, dA, dB, dm, db] =
      op.call(grad_y, y, x, h, W, lora_A, lora_B, magnitude, bias, norm, gain, scaling, false, mask & 31);
  const Tensor grad_rest = mask & 32 ? product(as_tokens(in_dtype(grad_y, W.scalar_type())), W).view(x.sizes())
                                     : at::empty({0}, x.options());
  return {dx, dA, dB, dm, db, grad_rest};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("linear_nf4_forward", linear_nf4_forward);
  m.impl("linear_nf4_backward", linear_nf4_backward);
}

}  // namespace dora_ext
