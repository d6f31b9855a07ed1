// adapter_backward on CUDA: in one pass where that fits, on Hopper by adapter_backward_hopper.cuh, elsewhere by
// adapter_backward.cuh, in one pass for each 32 ranks; else what every backend does.
#include "../adapter_backward.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "../check_linear.h"
#include "../layer_products.h"
#include "adapter_backward.cuh"
#include "adapter_backward_hopper.cuh"
#include "launch.h"
#include "product_face.h"

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

// What goes in, contiguous, norm and gain in fp32; and the results: all but G and bias are made whether asked for or
// not, which costs nothing.
struct Operands {
  Tensor grad, h, lora_B, norm, gain;
  OptionalTensor y, bias;
  double scaling;
};
struct Gradients {
  Tensor G, P, B, magnitude, bias;
};

// Of a pass over `ranks` ranks from `first` on, whose sums have `padded` of them; `partials` keeps their memory. The
// first pass also makes G and the gradients of magnitude and bias.
template <typename T>
AdapterBackwardProblem<T> pass_problem(const Operands& o, const Gradients& to, int64_t first, int64_t ranks,
                                       const AdapterBackwardPlan& plan, int64_t padded, Tensor& partials) {
  const int64_t tokens = o.grad.size(0), out = o.grad.size(1), line = o.lora_B.size(1);
  const int64_t size_E = plan.splits * out * padded, size_P = plan.groups * tokens * padded;
  partials = at::empty({size_E + size_P + plan.splits * 2 * out}, o.norm.options());
  AdapterBackwardProblem<T> p{};
  p.grad = data<T>(o.grad);
  p.y = o.y && first == 0 ? data<T>(*o.y) : nullptr;
  p.h = data<T>(o.h) + first;
  p.lora_B = feature_vector(o.lora_B);
  p.lora_B.data = static_cast<const char*>(p.lora_B.data) + first * o.lora_B.element_size();
  p.gain = data<float>(o.gain);
  p.bias = o.bias ? feature_vector(*o.bias) : FeatureVector{nullptr, Dtype::kFloat};
  p.scaled = to.G.defined() && first == 0 ? mutable_data<T>(to.G) : nullptr;
  p.partial_E = mutable_data<float>(partials);
  p.partial_P = p.partial_E + size_E;
  p.sums = p.partial_P + size_P;
  p.tokens = tokens;
  p.out = out;
  p.rank = static_cast<int>(std::min(line - first, ranks));
  p.line = static_cast<int>(line);
  return p;
}

template <typename T, int KT>
void finish_pass(const Operands& o, const Gradients& to, int64_t first, const AdapterBackwardPlan& plan,
                 const AdapterBackwardProblem<T>& p) {
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const auto finish = [&](auto* grad_B) {
    launch_adapter_backward_finish<T, KT>(p, plan, static_cast<float>(o.scaling), data<float>(o.norm),
                                          mutable_data<T>(to.P) + first, grad_B + first, first == 0,
                                          feature_result(to.magnitude),
                                          to.bias.defined() ? mutable_data<float>(to.bias) : nullptr, current_stream());
  };
  if (to.B.scalar_type() == at::kFloat) {
    finish(mutable_data<float>(to.B));
  } else {
    finish(mutable_data<T>(to.B));
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, int KT>
void pass(const Operands& o, const Gradients& to, int64_t first) {
  constexpr int kPadded = AdapterBackwardTile<KT>::kRank;
  const AdapterBackwardPlan plan = plan_adapter_backward<KT>(
      o.grad.size(0), o.grad.size(1), multiprocessors(), device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  Tensor partials;
  const auto p = pass_problem<T>(o, to, first, kPadded, plan, kPadded, partials);
  launch_adapter_backward<T, KT>(p, plan, current_stream());
  finish_pass<T, KT>(o, to, first, plan, p);
}

// All ranks in one pass; false where it can't be, or is not to be.
template <typename T, int KT>
bool pass_on_hopper(const Operands& o, const Gradients& to) {
  constexpr int kPadded = 16 * KT;
  if (library_products_chosen() || std::max(o.grad.size(0), o.grad.size(1)) > INT32_MAX - 512 || !on_hopper() ||
      !has_hopper_code(adapter_backward_hopper_kernel<T, kPadded>)) {
    return false;
  }
  const HopperAdapterPlan shares =
      plan_adapter_backward_hopper<kPadded>(o.grad.size(0), o.grad.size(1), multiprocessors());
  const AdapterBackwardPlan plan{0, shares.groups, 0, shares.splits};
  Tensor partials;
  const auto p = pass_problem<T>(o, to, 0, kPadded, plan, kPadded, partials);
  if (!launch_adapter_backward_hopper<T, kPadded>(p, shares, current_stream())) return false;
  finish_pass<T, KT>(o, to, 0, plan, p);
  return true;
}

template <typename T>
AdapterGradients run(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B,
                     const Tensor& norm, const Tensor& gain, const OptionalTensor& bias, double scaling, int64_t mask,
                     std::optional<at::ScalarType> magnitude_dtype) {
  constexpr int64_t kRanksOfPass = 32;
  const int64_t tokens = grad.size(0), out = grad.size(1), rank = lora_B.size(1);
  const Operands o{grad,
                   h,
                   aligned(lora_B, 16),
                   in_dtype(norm, at::kFloat).contiguous(),
                   in_dtype(gain, at::kFloat).contiguous(),
                   y,
                   bias ? OptionalTensor(bias->contiguous()) : std::nullopt,
                   scaling};
  const Gradients to{mask & kWantG ? at::empty_like(grad) : Tensor(), at::empty({tokens, rank}, grad.options()),
                     at::empty({out, rank}, lora_B.options()),
                     at::empty({out}, o.norm.options().dtype(magnitude_dtype.value_or(at::kFloat))),
                     mask & kWantBias ? at::empty({out}, o.norm.options()) : Tensor()};
  const bool done = rank <= 16   ? pass_on_hopper<T, 1>(o, to)
                    : rank <= 32 ? pass_on_hopper<T, 2>(o, to)
                                 : pass_on_hopper<T, 4>(o, to);
  const bool all_ranks = mask & (kWantP | kWantB);
  for (int64_t first = 0; !done && first < (all_ranks ? rank : 1); first += kRanksOfPass) {
    (rank - first <= 16 ? pass<T, 1> : pass<T, 2>)(o, to, first);
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
