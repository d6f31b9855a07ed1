// adapter_backward on CUDA: the one-pass kernel where it fits, else what every backend does. The kernel:
// adapter_backward.cuh.
#include "../adapter_backward.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../check_linear.h"
#include "adapter_backward.cuh"
#include "launch.h"

namespace dora_ext {
namespace {

bool one_pass_fits(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B) {
  const auto dtype = grad.scalar_type(), wide = lora_B.scalar_type();
  const int64_t rank = lora_B.size(1);
  const auto fits = [](const Tensor& t) { return t.is_contiguous() && lies_on(t, 16); };
  return is_half(dtype) && (wide == dtype || wide == at::kFloat) && grad.numel() > 0 && grad.size(1) % 8 == 0 &&
         one_pass_rank(rank) && fits(grad) && (!y || fits(*y)) && fits(h) && capability() >= 80 &&
         shared_bytes_per_block() >= AdapterBackwardTile<2>::kSharedBytes;
}

template <typename T, int KT>
AdapterGradients run(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B,
                     const Tensor& norm, const Tensor& gain, const OptionalTensor& bias, double scaling, int64_t mask) {
  constexpr int kPadded = AdapterBackwardTile<KT>::kRank;
  const int64_t tokens = grad.size(0), out = grad.size(1), rank = lora_B.size(1);
  const Tensor n = in_dtype(norm, at::kFloat).contiguous(), g = in_dtype(gain, at::kFloat).contiguous();
  const Tensor B = lora_B.contiguous(), b = bias ? bias->contiguous() : Tensor();
  const AdapterBackwardPlan plan = plan_adapter_backward<KT>(
      tokens, out, multiprocessors(), device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  const Tensor G = mask & kWantG ? at::empty_like(grad) : Tensor();
  const Tensor P = at::empty({tokens, rank}, grad.options()), grad_B = at::empty({out, rank}, lora_B.options());
  const auto options = n.options();
  const Tensor grad_m = at::empty({out}, options), grad_b = at::empty({out}, options);
  const int64_t size_E = plan.splits * out * kPadded, size_P = plan.groups * tokens * kPadded;
  const Tensor partials = at::empty({size_E + size_P + plan.splits * 2 * out}, options);

  AdapterBackwardProblem<T> p{};
  p.grad = data<T>(grad);
  p.y = y ? data<T>(*y) : nullptr;
  p.h = data<T>(h);
  p.lora_B = feature_vector(B);
  p.gain = data<float>(g);
  p.bias = bias ? feature_vector(b) : FeatureVector{nullptr, Dtype::kFloat};
  p.scaled = G.defined() ? mutable_data<T>(G) : nullptr;
  p.partial_E = mutable_data<float>(partials);
  p.partial_P = p.partial_E + size_E;
  p.sums = p.partial_P + size_P;
  p.tokens = tokens;
  p.out = out;
  p.rank = static_cast<int>(rank);
  const cudaStream_t stream = current_stream();
  launch_adapter_backward<T, KT>(p, plan, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const auto finish = [&](auto* to) {
    launch_adapter_backward_finish<T, KT>(p, plan, static_cast<float>(scaling), data<float>(n), mutable_data<T>(P), to,
                                          mutable_data<float>(grad_m), mutable_data<float>(grad_b), stream);
  };
  if (lora_B.scalar_type() == at::kFloat) {
    finish(mutable_data<float>(grad_B));
  } else {
    finish(mutable_data<T>(grad_B));
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  // All but G come at no cost, asked for or not.
  const auto asked = [&](int64_t bit, const Tensor& t) { return mask & bit ? t : at::empty({0}, grad.options()); };
  return {asked(kWantG, G), asked(kWantP, P), asked(kWantB, grad_B), asked(kWantMagnitude, grad_m),
          asked(kWantBias, grad_b)};
}

AdapterGradients adapter_backward_cuda(const Tensor& grad, const OptionalTensor& y, const Tensor& h,
                                       const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                                       const OptionalTensor& bias, double scaling, int64_t mask) {
  check_adapter_backward(grad, y, h, lora_B, norm, gain, bias, scaling, mask);
  const c10::cuda::CUDAGuard guard(grad.device());
  if (!one_pass_fits(grad, y, h, lora_B)) {
    return adapter_backward_composed(grad, y, h, lora_B, norm, gain, bias, scaling, mask);
  }
  const bool half = grad.scalar_type() == at::kHalf, narrow = lora_B.size(1) <= 16;
  const auto run_it =
      half ? (narrow ? run<__half, 1> : run<__half, 2>) : (narrow ? run<__nv_bfloat16, 1> : run<__nv_bfloat16, 2>);
  return run_it(grad, y, h, lora_B, norm, gain, bias, scaling, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("adapter_backward", &adapter_backward_cuda);
}

}  // namespace dora_ext
