// dora_ext::embedding: the embedding with its place in autograd's graph.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "autograd_node.h"
#include "check.h"
#include "inside_op.h"

namespace dora_ext {
namespace {

// What gets no gradient.
struct Constants {
  const Tensor &ids, &weight, &norm, &gain;
  double scaling, embed_scale;
  int64_t padding_idx;
  bool scale_grad_by_freq, held;
};

Tensor forward(const Tensor& lora_A, const Tensor& lora_B, const Constants& c) {
  InsideOp guard;
  static auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double)>(
          "dora_ext::embedding_forward");
  return op.call(c.ids, c.weight, lora_A, lora_B, c.gain, c.scaling, c.embed_scale);
}

struct DoraEmbedding : Function<DoraEmbedding> {
  static Tensor forward(AutogradContext* context, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
                        const Constants& c) {
    NodeKeeps{{c.ids}, {c.norm, c.gain}, {c.weight.requires_grad() ? c.weight.detach() : c.weight, lora_A, lora_B}}
        .save(context, c.held);
    auto& kept = context->saved_data;
    kept["scaling"] = c.scaling;
    kept["embed_scale"] = c.embed_scale;
    kept["padding_idx"] = c.padding_idx;
    kept["scale_grad_by_freq"] = c.scale_grad_by_freq;
    kept["magnitude_dtype"] = static_cast<int64_t>(magnitude.scalar_type());
    return dora_ext::forward(lora_A, lora_B, c);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list results(4);
    if (!grads[0].defined()) return results;
    const NodeKeeps found = NodeKeeps::of(context, 1, 2, 3);
    const Tensor &ids = found.activations[0], &norm = found.constants[0], &gain = found.constants[1];
    const Tensor &weight = found.parameters[0], &lora_A = found.parameters[1], &lora_B = found.parameters[2];
    auto& kept = context->saved_data;
    const int64_t mask = asked_gradients(context, {true, true, true});
    static auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
        double, int64_t, bool, int64_t, std::optional<at::ScalarType>)>("dora_ext::embedding_backward");
    {
      InsideOp guard;
      std::tie(results[0], results[1], results[2]) =
          op.call(grads[0], ids, weight, lora_A, lora_B, norm, gain, kept["scaling"].toDouble(),
                  kept["embed_scale"].toDouble(), kept["padding_idx"].toInt(), kept["scale_grad_by_freq"].toBool(),
                  mask, static_cast<at::ScalarType>(kept["magnitude_dtype"].toInt()));
    }
    finish_gradients(results, mask, grads[0]);
    return results;
  }
};

Tensor embedding(const Tensor& ids, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                 const Tensor& magnitude, const Tensor& norm, const Tensor& gain, double scaling, double embed_scale,
                 int64_t padding_idx, bool scale_grad_by_freq, bool held) {
  const Constants constants{ids, weight, norm, gain, scaling, embed_scale, padding_idx, scale_grad_by_freq, held};
  if (is_recorded("dora_ext::embedding", {lora_A, lora_B, magnitude})) {
    return DoraEmbedding::apply(lora_A, lora_B, magnitude, constants);
  }
  return forward(lora_A, lora_B, constants);
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, Autograd, m) {
  m.impl("embedding", embedding);
}
// Of tensors that no graph is ever made of: those of inference mode.
TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("embedding", embedding);
}

}  // namespace dora_ext
