// cast_factors: lora_A and lora_B, fp32, in half precision by one launch. With a fingerprint it is that launch which
// casts them: norm_fingerprint.cuh.
#include "../factors.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "launch.h"

namespace dora_ext {
namespace {

constexpr int kThreads = 256;

// Words of four numbers.
template <typename T>
__global__ void __launch_bounds__(kThreads) cast_factors_kernel(const float4* lora_A, int64_t words_A, uint64_t* to_A,
                                                                const float4* lora_B, int64_t words_B, uint64_t* to_B) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < words_A) {
    to_A[i] = narrow_four<T>(lora_A[i]);
  } else if (i < words_A + words_B) {
    to_B[i - words_A] = narrow_four<T>(lora_B[i - words_A]);
  }
}

std::tuple<Tensor, Tensor> cast_factors_cuda(const Tensor& lora_A, const Tensor& lora_B, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(cast_factors_fits(lora_A, lora_B, dtype), "dora_ext::cast_factors: lora_A, lora_B: expected ",
                    "contiguous float32 of one device on 16 bytes, a multiple of 4 numbers, and dtype bfloat16 or "
                    "float16, got ",
                    text(lora_A.sizes()), " and ", text(lora_B.sizes()), " in ", lora_A.scalar_type(), " and ",
                    lora_B.scalar_type(), ", dtype ", dtype);
  const c10::cuda::CUDAGuard guard(lora_A.device());
  const auto options = lora_A.options().dtype(dtype);
  const Tensor A = at::empty(lora_A.sizes(), options), B = at::empty(lora_B.sizes(), options);
  const int64_t words_A = A.numel() / 4, words_B = B.numel() / 4;
  const auto blocks = static_cast<unsigned>((words_A + words_B + kThreads - 1) / kThreads);
  if (blocks == 0) return {A, B};
  const auto kernel = dtype == at::kHalf ? cast_factors_kernel<__half> : cast_factors_kernel<__nv_bfloat16>;
  kernel<<<blocks, kThreads, 0, current_stream()>>>(
      static_cast<const float4*>(lora_A.const_data_ptr()), words_A, static_cast<uint64_t*>(A.mutable_data_ptr()),
      static_cast<const float4*>(lora_B.const_data_ptr()), words_B, static_cast<uint64_t*>(B.mutable_data_ptr()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {A, B};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("cast_factors", &cast_factors_cuda);
}

}  // namespace dora_ext
