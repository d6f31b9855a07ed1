// compose, compose_ and compose_backward on CUDA. The kernels and how one is chosen: compose.cuh.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../aligned.h"
#include "../check.h"
#include "compose.cuh"
#include "compose_backward.cuh"
#include "launch.h"

namespace dora_ext {
namespace {

// How the kernels see an output-shaped tensor: features last in memory, which channels_last tensors have too, or
// channels first. Chosen by one tensor of a call; the others follow it.
class Layout {
 public:
  Layout(const Tensor& t, bool channels_first)
      : moved_(channels_first && t.movedim(1, -1).is_contiguous()), channels_first_(channels_first && !moved_) {
    if (!channels_first_) return;
    batch_ = t.size(0);
    for (int64_t d = 2; d < t.dim(); ++d) length_ *= t.size(d);
  }

  bool channels_first() const { return channels_first_; }
  int64_t batch() const { return batch_; }
  int64_t length() const { return length_; }

  // t's numbers in the order of the kernels; t itself, or a view of it, where they are in it already.
  Tensor arrange(const Tensor& t) const { return (moved_ ? t.movedim(1, -1) : t).contiguous(); }

  // The shape back, and the strides that at::empty_like(like) has.
  Tensor restore(const Tensor& arranged, const Tensor& like) const {
    const Tensor t = moved_ ? arranged.movedim(-1, 1) : arranged;
    return moved_ || like.is_contiguous() ? t : at::empty_like(like).copy_(t);
  }

 private:
  bool moved_, channels_first_;
  int64_t batch_ = 1, length_ = 1;
};

FeatureVector optional_feature_vector(const OptionalTensor& t) {
  return t ? feature_vector(*t) : FeatureVector{nullptr, Dtype::kFloat};
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(t->contiguous()) : std::nullopt;
}

// base and result arranged, of any shape; result may be base.
void run_compose(const Layout& layout, const Tensor& base, const Tensor& result, const Tensor& h, const Tensor& lora_B,
                 const Tensor& gain, const OptionalTensor& bias, double scaling, bool delta) {
  const auto dtype = base.scalar_type();
  const Tensor h_ = layout.arrange(h), B = in_dtype(lora_B, dtype).contiguous();
  const Tensor g = in_dtype(gain, accumulate_type(dtype)).contiguous();
  const OptionalTensor b = contiguous(bias);
  const int64_t out = B.size(0);
  switch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    ComposeProblem<T> p{};
    p.base = data<T>(base);
    p.result = mutable_data<T>(result);
    p.h = data<T>(h_);
    p.lora_B = data<T>(B);
    p.gain = data<Acc>(g);
    p.bias = optional_feature_vector(b);
    p.tokens = out == 0 ? 0 : base.numel() / out;
    p.batch = layout.batch();
    p.length = layout.length();
    p.out = out;
    p.rank = static_cast<int>(B.size(1));
    p.scaling = static_cast<Acc>(scaling);
    p.gain_factor = 1;
    p.delta = delta;
    if (layout.channels_first()) {
      launch_compose_channels_first(p, current_stream());
    } else {
      launch_compose_features_last(p, current_stream());
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

Tensor compose_cuda(const Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain,
                    const OptionalTensor& bias, double scaling, bool delta, bool channels_first) {
  check_compose(base, h, lora_B, gain, bias, scaling, channels_first);
  const c10::cuda::CUDAGuard guard(base.device());
  const Layout layout(base, channels_first);
  const Tensor arranged = layout.arrange(base);
  const Tensor result = at::empty_like(arranged);
  run_compose(layout, arranged, result, h, lora_B, gain, bias, scaling, delta);
  return layout.restore(result, base);
}

void compose_cuda_(Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain, const OptionalTensor& bias,
                   double scaling, bool delta, bool channels_first) {
  check_compose(base, h, lora_B, gain, bias, scaling, channels_first);
  const c10::cuda::CUDAGuard guard(base.device());
  const Layout layout(base, channels_first);
  const Tensor arranged = layout.arrange(base);
  run_compose(layout, arranged, arranged, h, lora_B, gain, bias, scaling, delta);
  if (arranged.const_data_ptr() != base.const_data_ptr()) base.copy_(arranged);
}

std::tuple<Tensor, Tensor, Tensor> compose_backward_cuda(const Tensor& grad, const Tensor& saved, const Tensor& norm,
                                                         const Tensor& gain, const OptionalTensor& bias,
                                                         bool saved_is_output, bool delta, bool channels_first,
                                                         bool want_G, std::optional<at::ScalarType> magnitude_dtype) {
  check_compose_backward(grad, saved, norm, gain, bias, channels_first);
  const c10::cuda::CUDAGuard guard(grad.device());
  const Layout layout(saved, channels_first);
  const Tensor d = layout.arrange(grad), v = layout.arrange(saved);
  const Tensor G = want_G ? at::empty_like(v) : at::empty({0}, v.options());
  const auto accumulate = accumulate_type(grad.scalar_type());
  const auto options = norm.options().dtype(accumulate);
  const Tensor n = in_dtype(norm, accumulate).contiguous(), g = in_dtype(gain, accumulate).contiguous();
  const OptionalTensor b = contiguous(bias);
  const int64_t out = norm.size(0);
  const Tensor grad_magnitude = at::empty({out}, options.dtype(magnitude_dtype.value_or(norm.scalar_type())));
  const Tensor grad_bias = at::empty({out}, options);
  const cudaStream_t stream = current_stream();
  switch_dtype(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    ComposeBackwardProblem<T> p{};
    p.grad = data<T>(d);
    p.saved = data<T>(v);
    p.scaled = want_G ? mutable_data<T>(G) : nullptr;
    p.gain = data<Acc>(g);
    p.gain_offset = delta ? -1 : 0;
    p.bias = optional_feature_vector(b);
    p.tokens = out == 0 ? 0 : d.numel() / out;
    p.batch = layout.batch();
    p.length = layout.length();
    p.out = out;
    const bool aligned = compose_backward_aligned(p, layout.channels_first());
    const BackwardPlan plan =
        plan_compose_backward<T>(p.tokens, p.batch, p.length, out, layout.channels_first(), aligned, multiprocessors());
    const Tensor partials = at::empty({plan.splits, 2, out}, options);
    p.partials = mutable_data<Acc>(partials);
    if (layout.channels_first()) {
      launch_compose_backward_channels_first(p, plan, aligned, stream);
    } else {
      launch_compose_backward_features_last(p, plan, aligned, stream);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    launch_compose_backward_finish<Acc>(p.partials, plan.splits, out, data<Acc>(n), data<Acc>(g), saved_is_output,
                                        /*factor=*/1, feature_result(grad_magnitude), mutable_data<Acc>(grad_bias),
                                        stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {want_G ? layout.restore(G, saved) : G, grad_magnitude, in_dtype(grad_bias, norm.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("compose", &compose_cuda);
  m.impl("compose_", &compose_cuda_);
  m.impl("compose_backward", &compose_backward_cuda);
}

}  // namespace dora_ext
