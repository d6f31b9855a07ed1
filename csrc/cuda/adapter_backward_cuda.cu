// adapter_backward on CUDA: the one-pass kernel where it fits, else what every backend does. The kernel:
// adapter_backward.cuh.
#include "../adapter_backward.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "../check_linear.h"
#include "adapter_backward.cuh"
#include "launch.h"

namespace dora_ext {
namespace {

bool one_pass_fits(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B) {
  const auto dtype = grad.scalar_type(), wide = lora_B.scalar_type();
  const c10::cuda::CUDAGuard guard(grad.device());
  const int64_t rank = lora_B.size(1);
  const auto fits = [](const Tensor& t) { return t.is_contiguous() && lies_on(t, 16); };
  return is_half(dtype) && (wide == dtype || wide == at::kFloat) && grad.numel() > 0 && grad.size(1) % 8 == 0 &&
         one_pass_rank(rank) && fits(grad) && (!y || fits(*y)) && fits(h) && capability() >= 80 &&
         shared_bytes_per_block() >= AdapterBackwardTile<2>::kSharedBytes;
}

constexpr int64_t kRanksOfPass = 32;

// The results, each with its memory, asked for or not: all but G come at no cost.
struct Gradients {
  Tensor G, P, B, magnitude, bias;
};

// The ranks from `first` on. The first pass also makes G and the gradients of magnitude and bias.
template <typename T, int KT>
void pass(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B, const Tensor& norm,
          const Tensor& gain, const OptionalTensor& bias, double scaling, int64_t first, const Gradients& to) {
  constexpr int kPadded = AdapterBackwardTile<KT>::kRank;
  const int64_t tokens = grad.size(0), out = grad.size(1), line = lora_B.size(1);
  const AdapterBackwardPlan plan = plan_adapter_backward<KT>(
      tokens, out, multiprocessors(), device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  const int64_t size_E = plan.splits * out * kPadded, size_P = plan.groups * tokens * kPadded;
  const Tensor partials = at::empty({size_E + size_P + plan.splits * 2 * out}, norm.options());

  AdapterBackwardProblem<T> p{};
  p.grad = data<T>(grad);
  p.y = y && first == 0 ? data<T>(*y) : nullptr;
  p.h = data<T>(h) + first;
  p.lora_B = feature_vector(lora_B);
  p.lora_B.data = static_cast<const char*>(p.lora_B.data) + first * lora_B.element_size();
  p.gain = data<float>(gain);
  p.bias = bias ? feature_vector(*bias) : FeatureVector{nullptr, Dtype::kFloat};
  p.scaled = to.G.defined() && first == 0 ? mutable_data<T>(to.G) : nullptr;
  p.partial_E = mutable_data<float>(partials);
  p.partial_P = p.partial_E + size_E;
  p.sums = p.partial_P + size_P;
  p.tokens = tokens;
  p.out = out;
  p.rank = static_cast<int>(std::min(line - first, kRanksOfPass));
  p.line = static_cast<int>(line);
  const cudaStream_t stream = current_stream();
  launch_adapter_backward<T, KT>(p, plan, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const auto finish = [&](auto* grad_B) {
    launch_adapter_backward_finish<T, KT>(p, plan, static_cast<float>(scaling), data<float>(norm),
                                          mutable_data<T>(to.P) + first, grad_B + first, first == 0,
                                          feature_result(to.magnitude), mutable_data<float>(to.bias), stream);
  };
  if (lora_B.scalar_type() == at::kFloat) {
    finish(mutable_data<float>(to.B));
  } else {
    finish(mutable_data<T>(to.B));
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
AdapterGradients run(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B,
                     const Tensor& norm, const Tensor& gain, const OptionalTensor& bias, double scaling, int64_t mask,
                     std::optional<at::ScalarType> magnitude_dtype) {
  const int64_t tokens = grad.size(0), out = grad.size(1), rank = lora_B.size(1);
  const Tensor n = in_dtype(norm, at::kFloat).contiguous(), g = in_dtype(gain, at::kFloat).contiguous();
  const Tensor B = lora_B.contiguous();
  const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const Gradients to{mask & kWantG ? at::empty_like(grad) : Tensor(), at::empty({tokens, rank}, grad.options()),
                     at::empty({out, rank}, lora_B.options()),
                     at::empty({out}, n.options().dtype(magnitude_dtype.value_or(at::kFloat))),
                     at::empty({out}, n.options())};
  const bool all_ranks = mask & (kWantP | kWantB);
  for (int64_t first = 0; first < (all_ranks ? rank : 1); first += kRanksOfPass) {
    (rank - first <= 16 ? pass<T, 1> : pass<T, 2>)(grad, y, h, B, n, g, b, scaling, first, to);
  }
  const auto asked = [&](int64_t bit, const Tensor& t) { return mask & bit ? t : at::empty({0}, grad.options()); };
  return {asked(kWantG, to.G), asked(kWantP, to.P), asked(kWantB, to.B), asked(kWantMagnitude, to.magnitude),
          asked(kWantBias, to.bias)};
}

AdapterGradients adapter_backward_cuda(const Tensor& grad, const OptionalTensor& y, const Tensor& h,
                                       const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                                       const OptionalTensor& bias, double scaling, int64_t mask,
                                       std::optional<at::ScalarType> magnitude_dtype) {
  check_adapter_backward(grad, y, h, lora_B, norm, gain, bias, scaling, mask, magnitude_dtype);
  const c10::cuda::CUDAGuard guard(grad.device());
  if (!one_pass_fits(grad, y, h, lora_B)) {
    return adapter_backward_composed(grad, y, h, lora_B, norm, gain, bias, scaling, mask, magnitude_dtype);
  }
  const auto run_it = grad.scalar_type() == at::kHalf ? run<__half> : run<__nv_bfloat16>;
  return run_it(grad, y, h, lora_B, norm, gain, bias, scaling, mask, magnitude_dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("adapter_backward", &adapter_backward_cuda);
  m.impl("adapter_backward_in_one_pass", &one_pass_fits);
}

}  // namespace dora_ext
