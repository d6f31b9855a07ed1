// feature_gradients on CUDA: one launch in place of a dozen, each of which takes the host longer than the GPU.
#include "../feature_gradients.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "launch.h"

namespace dora_ext {
namespace {

constexpr int kWarps = 4;

// Matrices (out, rank), contiguous. Null: not given, or not asked for.
template <typename Acc>
struct FeatureGradientsProblem {
  FeatureVector E, lora_B, norm, gain, base_magnitude;
  FeatureResult grad_B, grad_magnitude, scaled_B;
  int64_t out, rank;
  Acc scaling;
};

// A warp a feature.
template <typename Acc>
__global__ void __launch_bounds__(32 * kWarps) feature_gradients_kernel(FeatureGradientsProblem<Acc> p) {
  const int64_t feature = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (feature >= p.out) return;
  const Acc scale = p.scaling * p.gain.template at<Acc>(feature);
  const bool has_E = p.E.data != nullptr, needs_B = p.grad_magnitude.data != nullptr || p.scaled_B.data != nullptr;
  constexpr int kAtOnce = 4;  // loads under way
  Acc sum = 0;
  for (int64_t first = lane; first < p.rank; first += 32 * kAtOnce) {
    Acc e[kAtOnce] = {}, b[kAtOnce] = {};
    const auto each = [&](auto&& use) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int64_t k = first + 32 * j;
        if (k < p.rank) use(feature * p.rank + k, j);
      }
    };
    if (has_E) each([&](int64_t i, int j) { e[j] = p.E.template at<Acc>(i); });
    if (needs_B) each([&](int64_t i, int j) { b[j] = p.lora_B.template at<Acc>(i); });
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) sum = fma(e[j], b[j], sum);
    if (p.grad_B.data != nullptr) each([&](int64_t i, int j) { p.grad_B.store(i, scale * e[j]); });
    if (p.scaled_B.data != nullptr) each([&](int64_t i, int j) { p.scaled_B.store(i, scale * b[j]); });
  }
  if (p.grad_magnitude.data == nullptr) return;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane != 0) return;
  const Acc n = p.norm.template at<Acc>(feature);
  const Acc base = p.base_magnitude.data != nullptr ? p.base_magnitude.template at<Acc>(feature) : Acc(0);
  // What is divided by 0 is 0: of such a feature there is nothing.
  p.grad_magnitude.store(feature, n == 0 ? Acc(0) : base + p.scaling * sum / n);
}

FeatureGradients feature_gradients_cuda(const OptionalTensor& E, const Tensor& lora_B, const Tensor& norm,
                                        const Tensor& gain, const OptionalTensor& grad_magnitude, double scaling,
                                        bool want_B, OptionalDtype magnitude_dtype, OptionalDtype scaled_dtype) {
  check_feature_gradients(E, lora_B, norm, gain, grad_magnitude, scaling, want_B, magnitude_dtype, scaled_dtype);
  const c10::cuda::CUDAGuard guard(lora_B.device());
  const int64_t out = lora_B.size(0), rank = lora_B.size(1);
  const auto result = [&](OptionalDtype dtype, at::IntArrayRef shape) {
    return dtype ? at::empty(shape, norm.options().dtype(*dtype)) : at::empty({0}, norm.options());
  };
  const Tensor grad_B = result(dtype_if(want_B, lora_B.scalar_type()), lora_B.sizes());
  const Tensor grad_m = result(magnitude_dtype, {out}), scaled_B = result(scaled_dtype, {out, rank});
  if (grad_B.numel() + grad_m.numel() + scaled_B.numel() == 0) return {grad_B, grad_m, scaled_B};

  const Tensor B = lora_B.contiguous(), n = norm.contiguous(), g = gain.contiguous();
  const Tensor e = E ? E->contiguous() : Tensor(), base = grad_magnitude ? grad_magnitude->contiguous() : Tensor();
  const auto given = [](const Tensor& t) { return t.defined() ? feature_vector(t) : FeatureVector{}; };
  const auto asked = [](const Tensor& t) { return t.numel() > 0 ? feature_result(t) : FeatureResult{}; };
  const auto launch = [&](auto zero) {
    using Acc = decltype(zero);
    const FeatureGradientsProblem<Acc> p{given(e),
                                         given(B),
                                         given(n),
                                         given(g),
                                         given(base),
                                         asked(grad_B),
                                         asked(grad_m),
                                         asked(scaled_B),
                                         out,
                                         rank,
                                         static_cast<Acc>(scaling)};
    const auto blocks = static_cast<unsigned>((out + kWarps - 1) / kWarps);
    feature_gradients_kernel<Acc><<<blocks, 32 * kWarps, 0, current_stream()>>>(p);
  };
  if (norm.scalar_type() == at::kDouble) {
    launch(0.0);
  } else {
    launch(0.0f);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_B, grad_m, scaled_B};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("feature_gradients", &feature_gradients_cuda);
}

}  // namespace dora_ext
