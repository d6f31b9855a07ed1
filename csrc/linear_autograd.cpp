// dora_ext::linear: the linear layer with its place in autograd's graph.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "autograd_node.h"
#include "check.h"
#include "inside_op.h"

namespace dora_ext {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, h, norm, gain

// What gets no gradient.
struct Constants {
  const Tensor& weight;
  const OptionalTensor &norm, &gain;
  double scaling;
  bool transposed;
  const OptionalTensor &cached, &fingerprint;
  int64_t epoch;
  bool held;
};

Results forward(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
                const OptionalTensor& bias, const Constants& c) {
  InsideOp guard;
  if (c.cached) {
    static auto op = find_op<Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     const OptionalTensor&, double, bool, Tensor&, Tensor&, int64_t)>(
        "dora_ext::linear_forward_cached");
    Tensor cached = *c.cached, fingerprint = *c.fingerprint;
    return op.call(x, c.weight, lora_A, lora_B, magnitude, bias, c.scaling, c.transposed, cached, fingerprint, c.epoch);
  }
  static auto op =
      find_op<Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                      const OptionalTensor&, const OptionalTensor&, double, bool)>("dora_ext::linear_forward");
  Results results = op.call(x, c.weight, lora_A, lora_B, magnitude, bias, c.norm, c.gain, c.scaling, c.transposed);
  if (c.gain) {
    std::get<2>(results) = *c.norm;
    std::get<3>(results) = *c.gain;
  }
  return results;
}

struct DoraLinear : Function<DoraLinear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                        const Tensor& magnitude, const OptionalTensor& bias, const Constants& constants) {
    auto [y, h, norm, gain] = dora_ext::forward(x, lora_A, lora_B, magnitude, bias, constants);
    const Tensor& weight = constants.weight;
    // The output serves to find u = x W^T + s h B^T again, so nothing of its size is kept besides it.
    NodeKeeps{{x, h, magnitude.requires_grad() ? saved_output(context, y) : Tensor()},
              {norm, gain},
              {weight.requires_grad() ? weight.detach() : weight, lora_A, lora_B, bias.value_or(Tensor())}}
        .save(context, constants.held);
    auto& kept = context->saved_data;
    kept["scaling"] = constants.scaling;
    kept["transposed"] = constants.transposed;
    kept["magnitude_dtype"] = static_cast<int64_t>(magnitude.scalar_type());
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list results(6);
    if (!grads[0].defined()) return results;
    const NodeKeeps found = NodeKeeps::of(context, 3, 2, 4);
    const Tensor &x = found.activations[0], &h = found.activations[1], &y = found.activations[2];
    const Tensor &norm = found.constants[0], &gain = found.constants[1];
    const Tensor &weight = found.parameters[0], &lora_A = found.parameters[1], &lora_B = found.parameters[2];
    const OptionalTensor bias = if_defined(found.parameters[3]);
    auto& kept = context->saved_data;
    const int64_t mask = asked_gradients(context, {true, true, true, true, bias.has_value()});
    const Tensor magnitude = like_magnitude(gain, kept["magnitude_dtype"].toInt());
    static auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
        const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, double, bool, int64_t)>(
        "dora_ext::linear_backward");
    {
      InsideOp guard;
      std::tie(results[0], results[1], results[2], results[3], results[4]) =
          op.call(grads[0], unchanged_output(context, y), x, h, weight, lora_A, lora_B, magnitude, bias, norm, gain,
                  kept["scaling"].toDouble(), kept["transposed"].toBool(), mask);
    }
    finish_gradients(results, mask, grads[0]);
    return results;
  }
};

Tensor linear_autograd(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                       const Tensor& magnitude, const OptionalTensor& bias, const OptionalTensor& norm,
                       const OptionalTensor& gain, double scaling, bool transposed, const OptionalTensor& cached,
                       const OptionalTensor& fingerprint, int64_t epoch, bool held) {
  const Constants constants{weight, norm, gain, scaling, transposed, cached, fingerprint, epoch, held};
  const bool recorded = is_recorded("dora_ext::linear", {x, lora_A, lora_B, magnitude, bias.value_or(Tensor())});
  if (recorded) return DoraLinear::apply(x, lora_A, lora_B, magnitude, bias, constants);
  return std::get<0>(forward(x, lora_A, lora_B, magnitude, bias, constants));
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, Autograd, m) {
  m.impl("linear", linear_autograd);
}
// Of tensors that no graph is ever made of: those of inference mode.
TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("linear", linear_autograd);
}

}  // namespace dora_ext
