// norm and norm_cached on CUDA. The kernels and how one is chosen: norm.cuh.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../check.h"
#include "../conv_norm.h"
#include "launch.h"
#include "norm.cuh"
#include "norm_factors.h"
#include "norm_fingerprint.cuh"
#include "norm_launch.h"

namespace dora_ext {
namespace {

WideFactors wide_factors(const FactorsToCast* cast) {
  return cast == nullptr ? WideFactors{} : WideFactors{data<float>(cast->A), data<float>(cast->B)};
}

}  // namespace

std::tuple<Tensor, Tensor> launch_norms(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                        const Tensor& magnitude, double scaling, bool transposed, const KeptNorms* kept,
                                        const FactorsToCast* cast) {
  const auto options = weight.options().dtype(accumulate_type(weight.scalar_type()));
  const int64_t out = lora_B.size(0), in = lora_A.size(1);
  Tensor norm = at::empty({out}, options), gain = at::empty({out}, options);
  if (out == 0) return {norm, gain};

  // A transposed view of a contiguous matrix is the other layout, not a reason to copy it.
  const bool view = !weight.is_contiguous() && weight.t().is_contiguous();
  if (view) transposed = !transposed;
  const Tensor w = view ? weight.t() : weight.contiguous();
  const NormFactors factors(lora_A, lora_B, w.scalar_type(), transposed);
  const Tensor &a = factors.A, &b = factors.B;
  const Tensor m = magnitude.contiguous();
  const cudaStream_t stream = current_stream();

  switch_dtype(w.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    int64_t* marks = kept == nullptr ? nullptr : mutable_data<int64_t>(kept->fingerprint);
    Acc* stored = kept == nullptr ? nullptr : mutable_data<Acc>(kept->cached);
    NormProblem<T> problem{
        data<T>(w), data<T>(a), data<T>(b), out, in, a.size(1), static_cast<int>(a.size(0)), static_cast<Acc>(scaling),
        nullptr,    marks};
    const NormDevice device{multiprocessors(), shared_bytes_per_block(), capability()};
    const NormPlan<T> plan = transposed ? plan_norm<T, true>(problem, device) : plan_norm<T, false>(problem, device);
    const Tensor partials = at::empty({plan.splits.count, out}, options);
    problem.partials = mutable_data<Acc>(partials);

    if (marks != nullptr)
      launch_fingerprint(problem, wide_factors(cast), transposed, scaling, kept->epoch, marks, device.multiprocessors,
                         stream);
    launch_norm(plan, problem, stream);
    launch_norm_finish<Acc>(problem.partials, plan.splits.count, out, feature_vector(m), marks, stored,
                            mutable_data<Acc>(norm), mutable_data<Acc>(gain), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {norm, gain};
}

void launch_fingerprint_alone(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
                              const KeptNorms& kept, const FactorsToCast* cast) {
  switch_dtype(weight.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    NormProblem<T> problem{};
    problem.weight = data<T>(weight);
    problem.lora_A = data<T>(lora_A);
    problem.lora_B = data<T>(lora_B);
    problem.out = weight.size(0);
    problem.in = problem.pitch_A = weight.size(1);
    problem.rank = static_cast<int>(lora_A.size(0));
    launch_fingerprint(problem, wide_factors(cast), /*transposed=*/false, scaling, kept.epoch,
                       mutable_data<int64_t>(kept.fingerprint), multiprocessors(), current_stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

namespace {

std::tuple<Tensor, Tensor> norm_cuda(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                     const Tensor& magnitude, double scaling, bool transposed) {
  if (weight.dim() > 2) {
    return conv_norm(weight, lora_A, lora_B, magnitude,
                     [&](const Tensor& W, const Tensor& A, const Tensor& B, const Tensor& m) {
                       return norm_cuda(W, A, B, m, scaling, transposed);
                     });
  }
  check_norm(weight, lora_A, lora_B, magnitude, scaling, transposed);
  const c10::cuda::CUDAGuard guard(weight.device());
  return launch_norms(weight, lora_A, lora_B, magnitude, scaling, transposed, nullptr, nullptr);
}

std::tuple<Tensor, Tensor> norm_cached_cuda(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                            const Tensor& magnitude, double scaling, bool transposed, Tensor& cached,
                                            Tensor& fingerprint, int64_t epoch) {
  if (weight.dim() > 2) {
    return conv_norm(weight, lora_A, lora_B, magnitude,
                     [&](const Tensor& W, const Tensor& A, const Tensor& B, const Tensor& m) {
                       return norm_cached_cuda(W, A, B, m, scaling, transposed, cached, fingerprint, epoch);
                     });
  }
  check_norm_cached(weight, lora_A, lora_B, magnitude, scaling, transposed, cached, fingerprint);
  const c10::cuda::CUDAGuard guard(weight.device());
  const KeptNorms kept{cached, fingerprint, epoch};
  return launch_norms(weight, lora_A, lora_B, magnitude, scaling, transposed, &kept, nullptr);
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("norm", &norm_cuda);
  m.impl("norm_cached", &norm_cached_cuda);
}

}  // namespace dora_ext
