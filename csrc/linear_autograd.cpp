// dora_ext::linear: the linear layer with its place in autograd's graph. In C++, so that a step of training runs no
// Python between the layer's call and its gradients: that takes the host longer than their launches.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "check.h"
#include "inside_op.h"
#include "kept_norms.h"

namespace dora_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, h, norm, gain

// What gets no gradient.
struct Constants {
  const Tensor& weight;
  const OptionalTensor &norm, &gain;
  double scaling;
  bool transposed;
  const OptionalTensor &cached, &fingerprint;
  int64_t epoch;
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

// -1: of inference mode, whose tensors have none.
int64_t version_of(const Tensor& t) {
  return t.is_inference() ? -1 : static_cast<int64_t>(t._version());
}

// The gradients are constants of a second backward, which must not go on silently.
struct OnceDifferentiable : Function<OnceDifferentiable> {
  static Tensor forward(AutogradContext*, const Tensor& gradient, const Tensor&) { return gradient.detach(); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "dora_ext: trying to differentiate twice a DoRA layer, which is once differentiable");
  }
};

struct DoraLinear : Function<DoraLinear> {
  static constexpr int kInputs = 6;  // of forward

  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                        const Tensor& magnitude, const OptionalTensor& bias, const Constants& constants) {
    auto [y, h, norm, gain] = dora_ext::forward(x, lora_A, lora_B, magnitude, bias, constants);
    const Tensor& weight = constants.weight;
    auto& kept = context->saved_data;
    // The output serves to find u = x W^T + s h B^T again, so nothing of its size is kept besides it. Whoever
    // overwrites it in place (ReLU(inplace=True)) makes it useless, which is no error: so it is saved without its
    // version, and something empty has that instead.
    Tensor output;
    if (magnitude.requires_grad()) {
      output = y.variable_data();
      const Tensor counter = at::empty({0}, y.options());
      torch::autograd::impl::set_version_counter(counter, torch::autograd::impl::version_counter(y));
      kept["output_counter"] = counter;
      kept["output_version"] = version_of(counter);
    }
    context->save_for_backward(
        {x, h, weight.requires_grad() ? weight.detach() : weight, lora_A, lora_B, bias.value_or(Tensor()), output});
    // Small, and nobody trains them: a hook on saved tensors (activation checkpointing) costs more than they do.
    kept["norm"] = norm;
    kept["gain"] = gain;
    kept["norm_version"] = version_of(norm);
    kept["gain_version"] = version_of(gain);
    kept["scaling"] = constants.scaling;
    kept["transposed"] = constants.transposed;
    kept["magnitude_dtype"] = static_cast<int64_t>(magnitude.scalar_type());
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list results(kInputs);
    if (!grads[0].defined()) return results;
    const variable_list saved = context->get_saved_variables();
    auto& kept = context->saved_data;
    const Tensor norm = kept["norm"].toTensor(), gain = kept["gain"].toTensor();
    TORCH_CHECK(version_of(norm) == kept["norm_version"].toInt() && version_of(gain) == kept["gain_version"].toInt(),
                "dora_ext: a norm, gain or scale needed for backward was modified by an inplace operation");
    const auto given = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const OptionalTensor bias = given(saved[5]);
    OptionalTensor y = given(saved[6]);
    if (y && version_of(kept["output_counter"].toTensor()) != kept["output_version"].toInt()) y.reset();
    int64_t mask = 0;
    for (int i = 0; i < (bias ? 5 : 4); ++i) mask |= int64_t{context->needs_input_grad(i)} << i;
    // In m's place: what is asked of it is its shape and its dtype.
    const auto dtype = static_cast<at::ScalarType>(kept["magnitude_dtype"].toInt());
    const Tensor magnitude = gain.scalar_type() == dtype ? gain : at::empty_like(gain, gain.options().dtype(dtype));
    static auto op = find_op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
        const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, double, bool, int64_t)>(
        "dora_ext::linear_backward");
    {
      InsideOp guard;
      std::tie(results[0], results[1], results[2], results[3], results[4]) =
          op.call(grads[0], y, saved[0], saved[1], saved[2], saved[3], saved[4], magnitude, bias, norm, gain,
                  kept["scaling"].toDouble(), kept["transposed"].toBool(), mask);
    }
    const bool again = at::GradMode::is_enabled() && grads[0].requires_grad();
    for (int i = 0; i < 5; ++i) {
      if (!(mask >> i & 1)) {
        results[i] = Tensor();
      } else if (again) {
        results[i] = OnceDifferentiable::apply(results[i], grads[0]);
      }
    }
    return results;
  }
};

Tensor linear_autograd(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                       const Tensor& magnitude, const OptionalTensor& bias, const OptionalTensor& norm,
                       const OptionalTensor& gain, double scaling, bool transposed, const OptionalTensor& cached,
                       const OptionalTensor& fingerprint, int64_t epoch) {
  const Constants constants{weight, norm, gain, scaling, transposed, cached, fingerprint, epoch};
  for (const Tensor& t : {x, weight, lora_A, lora_B, magnitude, bias.value_or(Tensor())}) {
    TORCH_CHECK_NOT_IMPLEMENTED(!t.defined() || !t._fw_grad(/*level=*/0).defined(),
                                "dora_ext::linear has no forward-mode derivative");
  }
  const bool recorded =
      at::GradMode::is_enabled() && (x.requires_grad() || lora_A.requires_grad() || lora_B.requires_grad() ||
                                     magnitude.requires_grad() || (bias && bias->requires_grad()));
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
