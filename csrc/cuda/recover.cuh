// dm where the gain is so small that the output has lost u, from the products themselves. In nearly every call no
// feature is concerned: a few blocks look at all norms and gains and return. They do so beside the launch that fills
// the rest of dm.
#pragma once

#include <algorithm>

#include "compose_backward.cuh"
#include "launches.cuh"
#include "nf4.cuh"

namespace dora_ext {

// W (out, in) as it lies in memory. at(j, i): one number of it.
template <typename T>
struct StridedWeight {
  const T* data;
  int64_t out_stride, in_stride;

  __device__ __forceinline__ accumulate_t<T> at(int64_t j, int64_t i) const {
    return widen(data[j * out_stride + i * in_stride]);
  }
};

// W packed in NF4, as dequantize_nf4 gives it in `dtype`, then in T.
template <typename T>
struct PackedWeight {
  const uint8_t* packed;
  Nf4Scales scales;
  int block_shift;
  int64_t in;
  Dtype dtype;

  __device__ __forceinline__ accumulate_t<T> at(int64_t j, int64_t i) const {
    const int64_t index = j * in + i, block = index >> block_shift;
    const float scale = scales.nested_absmax != nullptr ? scale_at<true>(scales, block, nested_offset<true>(scales))
                                                        : scale_at<false>(scales, block, -0.f);
    float v = multiply_ftz(kNf4Device.value[packed[index / 2] >> code_bit(static_cast<int>(index % 2)) & 15], scale);
    if (dtype == Dtype::kHalf) v = widen(narrow<__half>(v));
    if (dtype == Dtype::kBFloat16) v = widen(narrow<__nv_bfloat16>(v));
    return widen(narrow<T>(v));
  }
};

template <typename T, typename Weight>
struct RecoverProblem {
  using Acc = accumulate_t<T>;
  FeatureResult grad_magnitude;  // (out,)
  int64_t grad_magnitude_stride;
  const T* grad;  // (tokens, out), strides:
  int64_t grad_token_stride, grad_feature_stride;
  const T* x;  // (tokens, in)
  const T* h;  // (tokens, rank)
  Weight weight;
  FeatureVector lora_B;  // (out, rank)
  const Acc* norm;       // (out,)
  const Acc* gain;       // (out,)
  int64_t tokens, out, in;
  int rank;
  Acc scaling;
};

// Returns this thread's part of sum_t grad[t] * sum_i left[t, i] * right(i), left (tokens, width). Thread = (token
// modulo 8, i modulo 32); right passes through shared memory in pieces, because W's column may be strided.
template <typename T, typename Weight, typename Right, typename Acc = accumulate_t<T>>
__device__ __forceinline__ Acc recover_sum(const RecoverProblem<T, Weight>& p, const T* grad, const T* left,
                                           int64_t width, Right right, Acc* shared) {
  constexpr int kPiece = 2048;
  const int lane = threadIdx.x % 32;
  Acc sum = 0;
  for (int64_t begin = 0; begin < width; begin += kPiece) {
    const int piece = static_cast<int>(min(int64_t{kPiece}, width - begin));
    __syncthreads();
    for (int i = threadIdx.x; i < piece; i += blockDim.x) shared[i] = right(begin + i);
    __syncthreads();
    for (int64_t token = threadIdx.x / 32; token < p.tokens; token += 8) {
      const T* row = left + token * width + begin;
      Acc part = 0;
#pragma unroll 8
      for (int i = lane; i < piece; i += 32) part = fma(widen(row[i]), shared[i], part);
      sum = fma(widen(grad[token * p.grad_token_stride]), part, sum);
    }
  }
  return sum;
}

// Feature blockIdx.x + i * gridDim.x: neighbours, which tend to be flagged together, go to different blocks.
template <typename T, typename Weight>
__global__ void __launch_bounds__(256) magnitude_grad_recover_kernel(RecoverProblem<T, Weight> p) {
  using Acc = accumulate_t<T>;
  __shared__ Acc shared[2048];
  __shared__ Acc warp_sums[8];
  const auto flagged = [&](int64_t j) { return p.norm[j] > 0 && !(abs(p.gain[j]) >= Acc(kSmallGain)); };
  allow_next_launch();
  int any = 0;
  for (int64_t j = blockIdx.x + threadIdx.x * int64_t{gridDim.x}; j < p.out; j += blockDim.x * int64_t{gridDim.x}) {
    any |= flagged(j);
  }
  any = __syncthreads_or(any);
  wait_for_previous_launch();  // whoever waits for this launch, waits for that one too
  if (!any) return;

  for (int64_t j = blockIdx.x; j < p.out; j += gridDim.x) {
    if (!flagged(j)) continue;
    const T* grad = p.grad + j * p.grad_feature_stride;
    Acc sum = recover_sum(p, grad, p.x, p.in, [&](int64_t i) -> Acc { return p.weight.at(j, i); }, shared);
    sum += p.scaling * recover_sum(
                           p, grad, p.h, p.rank,
                           [&](int64_t i) -> Acc { return p.lora_B.template at<Acc>(j * p.rank + i); }, shared);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      Acc total = 0;
      for (int warp = 0; warp < 8; ++warp) total += warp_sums[warp];
      p.grad_magnitude.store(j * p.grad_magnitude_stride, total / p.norm[j]);
    }
    __syncthreads();
  }
}

template <typename T, typename Weight>
void launch_magnitude_grad_recover(const RecoverProblem<T, Weight>& p, int multiprocessors, bool beside,
                                   cudaStream_t stream) {
  if (p.out == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(p.out, int64_t{multiprocessors} * 4));
  if (beside) {
    launch_beside(magnitude_grad_recover_kernel<T, Weight>, blocks, 256, 0, stream, p);
  } else {
    magnitude_grad_recover_kernel<<<blocks, 256, 0, stream>>>(p);
  }
}

}  // namespace dora_ext
