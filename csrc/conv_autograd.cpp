// dora_ext::conv: a convolution with its place in autograd's graph. Composed of the library's convolutions and products
// and of our passes over what they make. Symbols as in ops.cpp; features are the second dimension of x, h and y.
#include <ATen/core/Tensor.h>
#include <ATen/ops/block_diag.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "aligned.h"
#include "autograd_node.h"
#include "check.h"
#include "feature_gradients.h"
#include "inside_op.h"

namespace dora_ext {
namespace {

// What gets no gradient.
struct Constants {
  const Tensor &weight, &norm, &gain;
  double scaling;
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  bool held;
};

struct Geometry {
  std::vector<int64_t> stride, padding, dilation;

  Tensor forward(const Tensor& x, const Tensor& weight, int64_t groups) const {
    return at::convolution(x, weight, {}, stride, padding, dilation, /*transposed=*/false, /*output_padding=*/{0},
                           groups);
  }
  // The gradients of x and of the weight, those that are wanted.
  std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight, int64_t groups,
                                      bool want_x, bool want_weight) const {
    const auto [dx, dW, none] =
        at::convolution_backward(grad, x, weight, std::nullopt, stride, padding, dilation, /*transposed=*/false,
                                 /*output_padding=*/{0}, groups, {want_x, want_weight, false});
    return {dx, dW};
  }
};

// A grouped 1x1 kernel (out, r / groups, 1, ...) as a matrix (out, r) with zeros between the groups...
Tensor dense_matrix(const Tensor& lora_B, int64_t groups) {
  const Tensor matrix = lora_B.dim() == 2 ? lora_B : lora_B.flatten(1);
  return groups == 1 ? matrix : at::block_diag(matrix.chunk(groups));
}

// ...and back: of (out, r), what lies within the groups, (out, r / groups).
Tensor within_groups(const Tensor& matrix, int64_t groups) {
  if (groups == 1) return matrix;
  const int64_t out = matrix.size(0), r = matrix.size(1);
  return matrix.view({groups, out / groups, groups, r / groups})
      .diagonal(0, 0, 2)
      .movedim(-1, 0)
      .reshape({out, r / groups});
}

// Libraries' convolutions with few channels copy both of their arrays. By position nothing of an array's size is
// copied: t (batch, n, ...) as (positions, n) where memory has the features last, else as (batch, n, positions).
bool features_last(const Tensor& t) {
  return t.movedim(1, -1).is_contiguous();
}
Tensor by_position(const Tensor& t, bool features_last) {
  return features_last ? t.movedim(1, -1).flatten(0, -2) : t.flatten(2);
}

// (n, r): the sum over all positions of the features of t times those of h, n and r of them.
Tensor feature_products(const Tensor& t, const Tensor& h) {
  if (t.dim() == 2) return at::mm(t.t(), h);
  return at::sum(at::bmm(t, h.mT()), {0}, /*keepdim=*/false, accumulate_type(t.scalar_type()));
}

// t, by position, times (n, r), by feature: in the shape of `like`, but for r features in place of n.
Tensor times_matrix(const Tensor& t, const Tensor& matrix, const Tensor& like) {
  auto sizes = like.sym_sizes().vec();
  sizes[1] = matrix.sym_size(1);
  if (t.dim() == 3) return at::bmm(matrix.t().expand_symint({sizes[0], sizes[1], t.sym_size(1)}), t).view_symint(sizes);
  sizes.erase(sizes.begin() + 1);
  sizes.push_back(matrix.sym_size(1));
  return at::mm(t, matrix).view_symint(sizes).movedim(-1, 1);
}

Tensor compose(const Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain,
               const OptionalTensor& bias, double scaling) {
  static auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                  double, bool, bool)>("dora_ext::compose");
  return op.call(base, h, lora_B, gain, bias, scaling, /*delta=*/false, /*channels_first=*/true);
}

// g (W + s B A), rounded once, as W lies in memory, whether that has its channels last or not. A in W's dtype.
Tensor merged_weight(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                     double scaling) {
  const bool last = !weight.is_contiguous() && features_last(weight);
  const auto whole = [&](const Tensor& t) { return (last ? t.movedim(1, -1) : t).unsqueeze(0); };
  const Tensor W = compose(whole(weight), whole(lora_A), lora_B, gain, std::nullopt, scaling).squeeze(0);
  return last ? W.movedim(-1, 1) : W;
}

// The base's part of the magnitude's gradient, and the bias's gradient.
std::tuple<Tensor, Tensor> sums_of_gradient(const Tensor& grad, const Tensor& base, const Tensor& norm,
                                            const Tensor& gain) {
  static auto op = find_op<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, bool, bool, bool, bool,
      std::optional<at::ScalarType>)>("dora_ext::compose_backward");
  const auto [G, grad_magnitude, grad_bias] =
      op.call(grad, base, norm, gain, std::nullopt, /*saved_is_output=*/false, /*delta=*/false,
              /*channels_first=*/true, /*want_G=*/false, std::nullopt);
  return {grad_magnitude, grad_bias};
}

struct Results {
  Tensor y, base, h;
};

Results forward(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const OptionalTensor& bias,
                const Constants& c) {
  InsideOp guard;
  const Geometry geometry{c.stride.vec(), c.padding.vec(), c.dilation.vec()};
  const Tensor base = geometry.forward(x, c.weight, c.groups);
  const Tensor h = geometry.forward(x, in_dtype(lora_A, x.scalar_type()), 1);
  // Not in place: base is kept for the magnitude's gradient, and convolutions are so often followed by an in-place
  // activation that the output could not be kept instead.
  return {compose(base, h, dense_matrix(lora_B, c.groups), c.gain, bias, c.scaling), base, h};
}

struct DoraConv : Function<DoraConv> {
  enum Input { kX, kA, kB, kMagnitude, kBias };

  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                        const Tensor& magnitude, const OptionalTensor& bias, const Constants& c) {
    const Results results = dora_ext::forward(x, lora_A, lora_B, bias, c);
    NodeKeeps{{x, results.h, magnitude.requires_grad() ? results.base : Tensor()},
              {c.norm, c.gain},
              {c.weight.requires_grad() ? c.weight.detach() : c.weight, lora_A, lora_B}}
        .save(context, c.held);
    auto& kept = context->saved_data;
    kept["scaling"] = c.scaling;
    kept["stride"] = c.stride;
    kept["padding"] = c.padding;
    kept["dilation"] = c.dilation;
    kept["groups"] = c.groups;
    kept["magnitude_dtype"] = static_cast<int64_t>(magnitude.scalar_type());
    kept["magnitude_shape"] = magnitude.sizes();
    kept["bias_dtype"] = static_cast<int64_t>(bias ? bias->scalar_type() : at::kFloat);
    kept["biased"] = bias.has_value();
    return results.y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list results(6);
    if (!grads[0].defined()) return results;
    const NodeKeeps found = NodeKeeps::of(context, 3, 2, 3);
    const int64_t mask = asked_gradients(context, {true, true, true, true, context->saved_data["biased"].toBool()});
    {
      InsideOp guard;
      gradients(context, grads[0], found, mask, results);
    }
    finish_gradients(results, mask, grads[0]);
    return results;
  }

  static void gradients(AutogradContext* context, const Tensor& grad, const NodeKeeps& found, int64_t mask,
                        variable_list& to) {
    const Tensor &x = found.activations[0], &h = found.activations[1];
    const Tensor &norm = found.constants[0], &gain = found.constants[1];
    const Tensor &weight = found.parameters[0], &lora_A = found.parameters[1], &lora_B = found.parameters[2];
    auto& kept = context->saved_data;
    const double scaling = kept["scaling"].toDouble();
    const int64_t groups = kept["groups"].toInt();
    const Geometry geometry{kept["stride"].toIntVector(), kept["padding"].toIntVector(),
                            kept["dilation"].toIntVector()};
    const auto wants = [&](Input input) { return (mask >> input & 1) != 0; };
    const auto dtype = x.scalar_type();

    if (wants(kMagnitude) || wants(kBias)) {
      const Tensor& base = wants(kMagnitude) ? found.activations[2] : grad;
      std::tie(to[kMagnitude], to[kBias]) = sums_of_gradient(grad, base, norm, gain);
      if (wants(kBias)) to[kBias] = in_dtype(to[kBias], static_cast<at::ScalarType>(kept["bias_dtype"].toInt()));
    }
    // The gain goes to the weights, of which there are few, and G = g dY is never made. With one group B A is of the
    // weight's size: then one convolution makes dX, where its passes over dX would be more.
    const bool merged = wants(kX) && groups == 1 && weight.sym_numel() <= x.sym_numel();
    const bool wants_E = wants(kB) || wants(kMagnitude), wants_P = wants(kA) || (wants(kX) && !merged);
    const bool last = (wants_E || wants_P) && features_last(grad);
    const Tensor by_positions = wants_E || wants_P ? by_position(grad, last) : grad;
    OptionalTensor E;
    if (wants_E) E = within_groups(feature_products(by_positions, by_position(h, last)), groups);
    const auto magnitude_dtype = static_cast<at::ScalarType>(kept["magnitude_dtype"].toInt());
    Tensor scaled_B;
    std::tie(to[kB], to[kMagnitude], scaled_B) =
        feature_gradients_op(E, lora_B, norm, gain, if_defined(to[kMagnitude]), scaling, wants(kB),
                             dtype_if(wants(kMagnitude), magnitude_dtype), dtype_if(wants_P, dtype));
    if (wants(kMagnitude)) to[kMagnitude] = to[kMagnitude].view(kept["magnitude_shape"].toIntVector());

    const Tensor A = wants(kX) || wants_P ? in_dtype(lora_A, dtype) : lora_A;
    if (wants_P) {
      const Tensor P = times_matrix(by_positions, dense_matrix(scaled_B, groups), grad);
      std::tie(to[kX], to[kA]) = geometry.backward(P, x, A, 1, wants(kX) && !merged, wants(kA));
      if (wants(kA)) to[kA] = in_dtype(to[kA], lora_A.scalar_type());
    }
    if (!wants(kX)) return;
    if (merged) {
      const Tensor W = merged_weight(weight, A, dense_matrix(lora_B, 1), gain, scaling);
      to[kX] = std::get<0>(geometry.backward(grad, x, W, 1, true, false));
    } else {
      std::vector<int64_t> by_feature(weight.dim(), 1);
      by_feature[0] = -1;
      const Tensor W = in_dtype(weight.mul(gain.view(by_feature)), dtype);
      to[kX].add_(std::get<0>(geometry.backward(grad, x, W, groups, true, false)));
    }
  }
};

Tensor conv(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
            const OptionalTensor& bias, const Tensor& norm, const Tensor& gain, double scaling, at::IntArrayRef stride,
            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool held) {
  const Constants constants{weight, norm, gain, scaling, stride, padding, dilation, groups, held};
  if (is_recorded("dora_ext::conv", {x, lora_A, lora_B, magnitude, bias.value_or(Tensor())})) {
    return DoraConv::apply(x, lora_A, lora_B, magnitude, bias, constants);
  }
  return forward(x, lora_A, lora_B, bias, constants).y;
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, Autograd, m) {
  m.impl("conv", conv);
}
// Of tensors that no graph is ever made of: those of inference mode.
TORCH_LIBRARY_IMPL(dora_ext, CompositeExplicitAutograd, m) {
  m.impl("conv", conv);
}

}  // namespace dora_ext
