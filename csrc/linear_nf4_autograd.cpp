// dora_ext::linear_nf4: the linear layer over a W packed in NF4, with its place in autograd's graph. Between forward
// and backward W stays packed.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <tuple>

#include "autograd_node.h"
#include "check.h"
#include "decode.h"
#include "factors.h"
#include "inside_op.h"

namespace dora_ext {
namespace {

// W (out, in), and what else gets no gradient.
struct Constants {
  const Tensor &packed, &absmax;
  int64_t blocksize;
  c10::SymIntArrayRef shape;
  at::ScalarType dtype;
  const OptionalTensor &nested_absmax, &nested_code, &offset;
  int64_t nested_blocksize;
  double scaling;
  const OptionalTensor &cached, &fingerprint;
  int64_t epoch;
  bool held;
};

std::tuple<Tensor, Tensor> norm_and_gain(const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
                                         const Constants& c) {
  if (c.cached) {
    static auto op = find_op<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef, at::ScalarType, const OptionalTensor&,
        const OptionalTensor&, const OptionalTensor&, int64_t, const Tensor&, const Tensor&, const Tensor&, double,
        Tensor&, Tensor&, int64_t)>("dora_ext::norm_nf4_cached");
    Tensor cached = *c.cached, fingerprint = *c.fingerprint;
    return op.call(c.packed, c.absmax, c.blocksize, c.shape, c.dtype, c.nested_absmax, c.nested_code, c.offset,
                   c.nested_blocksize, lora_A, lora_B, magnitude, c.scaling, cached, fingerprint, c.epoch);
  }
  static auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef, at::ScalarType,
                                         const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
                                         const Tensor&, const Tensor&, const Tensor&, double)>("dora_ext::norm_nf4");
  return op.call(c.packed, c.absmax, c.blocksize, c.shape, c.dtype, c.nested_absmax, c.nested_code, c.offset,
                 c.nested_blocksize, lora_A, lora_B, magnitude, c.scaling);
}

struct Results {
  Tensor total, y, h, norm, gain;  // total = y + rest W^T
};

Results forward(const Tensor& x, Tensor lora_A, Tensor lora_B, const Tensor& magnitude, const OptionalTensor& bias,
                const OptionalTensor& rest, const Constants& c) {
  InsideOp guard;
  // Once, for the norm and for the product; decoding reads them as they are. A tensor that is being traced has no data.
  const bool is_real = !x.key_set().has(c10::DispatchKey::Python);
  if (is_real && x.dim() > 0 && x.numel() > kDecodeTokens * x.size(-1) && x.scalar_type() == c.dtype &&
      cast_factors_fits(lora_A, lora_B, c.dtype)) {
    std::tie(lora_A, lora_B) = cast_factors(lora_A, lora_B, c.dtype);
  }
  static auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef, at::ScalarType, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, int64_t, const Tensor&, const Tensor&, const Tensor&,
      const OptionalTensor&, const Tensor&, const Tensor&, double, const OptionalTensor&)>(
      "dora_ext::linear_nf4_forward");
  const auto [norm, gain] = norm_and_gain(lora_A, lora_B, magnitude, c);
  const auto [y, h, total] =
      op.call(x, c.packed, c.absmax, c.blocksize, c.shape, c.dtype, c.nested_absmax, c.nested_code, c.offset,
              c.nested_blocksize, lora_A, lora_B, magnitude, bias, norm, gain, c.scaling, rest);
  return {rest ? total : y, y, h, norm, gain};
}

struct DoraLinearNf4 : Function<DoraLinearNf4> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                        const Tensor& magnitude, const OptionalTensor& bias, const OptionalTensor& rest,
                        const Constants& c) {
    const Results results = dora_ext::forward(x, lora_A, lora_B, magnitude, bias, rest, c);
    Tensor output;
    if (magnitude.requires_grad()) output = rest ? results.y : saved_output(context, results.y);
    const Tensor none;
    NodeKeeps{{x, results.h, output},
              {results.norm, results.gain, c.absmax, c.nested_absmax.value_or(none), c.nested_code.value_or(none),
               c.offset.value_or(none)},
              {c.packed, lora_A, lora_B, bias.value_or(none)}}
        .save(context, c.held);
    auto& kept = context->saved_data;
    kept["blocksize"] = c.blocksize;
    kept["dtype"] = static_cast<int64_t>(c.dtype);
    kept["nested_blocksize"] = c.nested_blocksize;
    kept["scaling"] = c.scaling;
    kept["rest"] = rest.has_value();
    kept["magnitude_dtype"] = static_cast<int64_t>(magnitude.scalar_type());
    return results.total;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list results(7);
    if (!grads[0].defined()) return results;
    const NodeKeeps found = NodeKeeps::of(context, 3, 6, 4);
    const Tensor &x = found.activations[0], &h = found.activations[1], &y = found.activations[2];
    const Tensor &norm = found.constants[0], &gain = found.constants[1], &absmax = found.constants[2];
    const Tensor &packed = found.parameters[0], &lora_A = found.parameters[1], &lora_B = found.parameters[2];
    const OptionalTensor bias = if_defined(found.parameters[3]);
    auto& kept = context->saved_data;
    const bool rest = kept["rest"].toBool();
    const int64_t mask = asked_gradients(context, {true, true, true, true, bias.has_value(), rest});
    const c10::SymInt shape[] = {lora_B.sym_size(0), lora_A.sym_size(1)};
    static auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
        c10::SymIntArrayRef, at::ScalarType, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
        int64_t, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
        double, int64_t)>("dora_ext::linear_nf4_backward");
    {
      InsideOp guard;
      std::tie(results[0], results[1], results[2], results[3], results[4], results[5]) = op.call(
          grads[0], rest ? if_defined(y) : unchanged_output(context, y), x, h, packed, absmax,
          kept["blocksize"].toInt(), shape, static_cast<at::ScalarType>(kept["dtype"].toInt()),
          if_defined(found.constants[3]), if_defined(found.constants[4]), if_defined(found.constants[5]),
          kept["nested_blocksize"].toInt(), lora_A, lora_B, like_magnitude(gain, kept["magnitude_dtype"].toInt()), bias,
          norm, gain, kept["scaling"].toDouble(), mask);
    }
    finish_gradients(results, mask, grads[0]);
    return results;
  }
};

Tensor linear_nf4(const Tensor& x, const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                  c10::SymIntArrayRef shape, at::ScalarType dtype, const OptionalTensor& nested_absmax,
                  const OptionalTensor& nested_code, const OptionalTensor& offset, int64_t nested_blocksize,
                  const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude, const OptionalTensor& bias,
                  double scaling, const OptionalTensor& rest, const OptionalTensor& cached,
                  const OptionalTensor& fingerprint, int64_t epoch, bool held) {
  const Constants constants{packed, absmax,           blocksize, shape,  dtype,       nested_absmax, nested_code,
                            offset, nested_blocksize, scaling,   cached, fingerprint, epoch,         held};
  const Tensor none;
  const bool recorded =
      is_recorded("dora_ext::linear_nf4", {x, lora_A, lora_B, magnitude, bias.value_or(none), rest.value_or(none)});
  if (recorded) return DoraLinearNf4::apply(x, lora_A, lora_B, magnitude, bias, rest, constants);
  return forward(x, lora_A, lora_B, magnitude, bias, rest, constants).total;
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, Autograd, m) {
  m.impl("linear_nf4", linear_nf4);
}
// Of tensors that no graph is ever made of: those of inference mode.
TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("linear_nf4", linear_nf4);
}

}  // namespace dora_ext
