// scale_rows: a weight with the gain in it, for a backward product over more tokens than features. Bound by memory.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../check_product.h"
#include "compose_common.cuh"
#include "launch.h"

namespace dora_ext {
namespace {

constexpr int kThreads = 256, kSteps = 4;  // packs of 8 numbers a thread, kThreads apart

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(const T* weight, const float* gain, int64_t packs, int64_t packs_in_row, T* result) {
  const int64_t first = blockIdx.x * int64_t{kThreads * kSteps} + threadIdx.x;
  Pack<T, 8> v[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t i = first + s * kThreads;
    if (i < packs) v[s] = reinterpret_cast<const Pack<T, 8>*>(weight)[i];
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t i = first + s * kThreads;
    if (i >= packs) return;
    const float g = gain[i / packs_in_row];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[s].v[k] = narrow<T>(g * widen(v[s].v[k]));
    reinterpret_cast<Pack<T, 8>*>(result)[i] = v[s];
  }
}

Tensor scale_rows(const Tensor& weight, const Tensor& gain) {
  check_scale_rows(weight, gain);
  const c10::cuda::CUDAGuard guard(weight.device());
  const Tensor result = at::empty_like(weight), g = gain.to(at::kFloat).contiguous();
  const int64_t packs = weight.numel() / 8;
  if (packs == 0) return result;
  const auto blocks = static_cast<unsigned>((packs + kThreads * kSteps - 1) / (kThreads * kSteps));
  const auto launch = [&](auto tag) {
    using T = typename decltype(tag)::type;
    scale_rows_kernel<T><<<blocks, kThreads, 0, current_stream()>>>(data<T>(weight), data<float>(g), packs,
                                                                    weight.size(1) / 8, mutable_data<T>(result));
  };
  if (weight.scalar_type() == at::kHalf) {
    launch(TypeTag<__half>{});
  } else {
    launch(TypeTag<__nv_bfloat16>{});
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("scale_rows", &scale_rows);
}

}  // namespace dora_ext
