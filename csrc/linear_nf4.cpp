// DoRA's linear layer over a W packed in NF4: unpacked once in each direction, and gone when the op returns. The rest
// is linear.cpp's. Registered once for all backends; one that multiplies packed weights itself takes its place.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "check_decode.h"
#include "inside_op.h"

namespace dora_ext {
namespace {

// W (out, in) in `to`: the values that it has in `dtype`, cast.
Tensor unpack(const Tensor& packed, const Tensor& absmax, int64_t blocksize, c10::SymIntArrayRef shape,
              at::ScalarType dtype, const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
              const OptionalTensor& offset, int64_t nested_blocksize, at::ScalarType to) {
  static auto op =
      find_op<Tensor(const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef, at::ScalarType, const OptionalTensor&,
                     const OptionalTensor&, const OptionalTensor&, int64_t)>("dora_ext::dequantize_nf4");
  // Rounded once from fp32, so that this equals fp32 values that are rounded afterwards.
  const bool direct = dtype == at::kFloat && is_half(to);
  return op
      .call(packed, absmax, blocksize, shape, direct ? to : dtype, nested_absmax, nested_code, offset, nested_blocksize)
      .to(to);
}

Tensor as_rows(const Tensor& t, int64_t columns) {
  return t.reshape({t.numel() / std::max<int64_t>(1, columns), columns});
}

std::tuple<Tensor, Tensor, Tensor> linear_nf4_forward(
    const Tensor& x, const Tensor& packed, const Tensor& absmax, int64_t blocksize, c10::SymIntArrayRef shape,
    at::ScalarType dtype, const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
    const OptionalTensor& offset, int64_t nested_blocksize, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& magnitude, const OptionalTensor& bias, const Tensor& norm, const Tensor& gain, double scaling,
    const OptionalTensor& rest, const OptionalTensor& dense) {
  const char* name = "dora_ext::linear_nf4_forward";
  static auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, double, bool)>("dora_ext::linear_forward");
  InsideOp guard;
  check_float(name, "x", x);
  if (!dense && !rest && shape.size() == 2 && x.dim() > 0) {
    const Tensor tokens = as_rows(x, x.size(-1));
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
  const Tensor W = dense ? *dense
                         : unpack(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset,
                                  nested_blocksize, x.scalar_type());
  const auto [y, h, n, g] = op.call(x, W, lora_A, lora_B, magnitude, bias, norm, gain, scaling, false);
  if (!rest) return {y, h, at::empty({0}, y.options())};
  check_shape(name, "rest", *rest, x.sizes());
  const Tensor total = at::addmm(as_rows(y, W.size(0)), as_rows(*rest, W.size(1)), W.t());
  return {y, h, total.view(y.sizes())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_nf4_backward(
    const Tensor& grad_y, const OptionalTensor& y, const Tensor& x, const Tensor& h, const Tensor& packed,
    const Tensor& absmax, int64_t blocksize, c10::SymIntArrayRef shape, at::ScalarType dtype,
    const OptionalTensor& nested_absmax, const OptionalTensor& nested_code, const OptionalTensor& offset,
    int64_t nested_blocksize, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
    const OptionalTensor& bias, const Tensor& norm, const Tensor& gain, double scaling, int64_t mask) {
  static auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, double, bool, int64_t)>(
      "dora_ext::linear_backward");
  InsideOp guard;
  const Tensor W = unpack(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                          x.scalar_type());
  const auto [dx, dA, dB, dm, db] =
      op.call(grad_y, y, x, h, W, lora_A, lora_B, magnitude, bias, norm, gain, scaling, false, mask & 31);
  const Tensor grad_rest = mask & 32 ? at::mm(as_rows(grad_y.to(W.scalar_type()), W.size(0)), W).view(x.sizes())
                                     : at::empty({0}, x.options());
  return {dx, dA, dB, dm, db, grad_rest};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("linear_nf4_forward", linear_nf4_forward);
  m.impl("linear_nf4_backward", linear_nf4_backward);
}

}  // namespace dora_ext
