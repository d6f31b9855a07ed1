// quantize_nf4: weights into codes and scales, and the scales themselves. Arithmetic as in nf4.cuh.
#pragma once

#include <cfloat>

#include "nf4.cuh"

namespace dora_ext {

// The larger of a and |b|; of a number and a NaN, the number.
__device__ __forceinline__ float largest_ftz(float a, float b) {
  float most;
  asm("max.ftz.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(fabsf(b)));
  return most;
}

__device__ __forceinline__ float reciprocal_ftz(float a) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}

// A thread holds 8 weights in a row; blocksize / 8 threads share a scale, which for up to 256 weights lie in one warp.
// A thread block holds 4096 weights, a whole number of NF4 blocks of any size.

constexpr int kQuantizeThreads = 512;
constexpr int kQuantizePerThread = 8;

template <typename T>
struct alignas(16) QuantizeVector {
  T element[kQuantizePerThread];
};

// x: (numel,), 16-byte aligned; packed: (ceil(numel / 2),); absmax: (ceil(numel / blocksize),).
template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_nf4_kernel(const T* __restrict__ x, int block_shift, int64_t numel, uint8_t* __restrict__ packed,
                        float* __restrict__ absmax) {
  const int blocksize = 1 << block_shift;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kQuantizeThreads + thread) * kQuantizePerThread;
  const bool whole = start + kQuantizePerThread <= numel;

  float v[kQuantizePerThread] = {};
  if (whole) {
    const auto in = *reinterpret_cast<const QuantizeVector<T>*>(x + start);
#pragma unroll
    for (int k = 0; k < kQuantizePerThread; ++k) v[k] = widen(in.element[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kQuantizePerThread; ++k) {
      if (start + k < numel) v[k] = widen(x[start + k]);
    }
  }

  float most = -FLT_MAX;  // what is left of a block of NaN, as in bitsandbytes
#pragma unroll
  for (int k = 0; k < kQuantizePerThread; ++k) most = largest_ftz(most, v[k]);
  const int lanes = min(blocksize / kQuantizePerThread, 32);
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(~0u, most, offset);
    most = other > most ? other : most;
  }
  const int warps = blocksize / (32 * kQuantizePerThread);  // that share a scale; 0: part of one
  if (warps > 1) {
    __shared__ float of_warp[kQuantizeThreads / 32];
    if (lane == 0) of_warp[warp] = most;
    __syncthreads();
    const float* others = of_warp + (warp & ~(warps - 1));
    for (int i = 0; i < warps; ++i) most = others[i] > most ? others[i] : most;
  }
  if ((start & (blocksize - 1)) == 0 && start < numel) absmax[start >> block_shift] = most;

  // A block of zeros has an infinite reciprocal, NaN below, and code 0 (which times absmax 0 is again zero).
  const float reciprocal = reciprocal_ftz(most);
  uint32_t word = 0;
#pragma unroll
  for (int k = 0; k < kQuantizePerThread; ++k) {
    const float scaled = multiply_ftz(v[k], reciprocal);
    uint32_t code = 0;
#pragma unroll
    for (int t = 0; t < 15; ++t) code += scaled > kNf4Constant.threshold[t];
    word |= code << code_bit(k);
  }
  if (whole) {
    *reinterpret_cast<uint32_t*>(packed + start / 2) = word;
  } else {
    for (int64_t i = start; i < numel; i += 2) packed[i / 2] = static_cast<uint8_t>(word >> (4 * (i - start)));
  }
}

template <typename T>
void launch_quantize_nf4(const T* x, int64_t blocksize, int64_t numel, uint8_t* packed, float* absmax,
                         cudaStream_t stream) {
  constexpr int64_t kPerBlock = kQuantizeThreads * kQuantizePerThread;
  const int64_t blocks = (numel + kPerBlock - 1) / kPerBlock;
  if (blocks == 0) return;
  quantize_nf4_kernel<T>
      <<<static_cast<unsigned>(blocks), kQuantizeThreads, 0, stream>>>(x, shift_of(blocksize), numel, packed, absmax);
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantisation of the scales themselves, a thread block per block

constexpr int kAbsmaxThreads = 256;

// The index of the value nearest to x in value (256,), ascending: seven halvings, then the midpoint towards the
// neighbour on x's side. x on a midpoint stays with the value where the search ended. NaN: 0.
__device__ __forceinline__ int nearest_of_256(const float* value, float x) {
  int below = 0, at = 127, above = 255;
#pragma unroll
  for (int step = 64; step > 0; step /= 2) {
    const bool up = x > value[at];
    (up ? below : above) = at;
    at += up ? step : -step;
  }
  const float here = value[at];
  if (x > here) return x > (value[above] + here) * 0.5f ? above : at;
  return x < (value[below] + here) * 0.5f ? below : at;
}

// absmax: (numel,); code: (256,); codes: (numel,); nested_absmax: (ceil(numel / blocksize),).
__global__ void __launch_bounds__(kAbsmaxThreads)
    quantize_absmax_kernel(const float* __restrict__ absmax, const float* __restrict__ code, int64_t blocksize,
                           int64_t numel, uint8_t* __restrict__ codes, float* __restrict__ nested_absmax) {
  __shared__ float value[256];
  __shared__ float of_warp[kAbsmaxThreads / 32];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * blocksize;
  const int64_t end = start + blocksize < numel ? start + blocksize : numel;
  value[thread] = code[thread];
  float most = -FLT_MAX;
  for (int64_t i = start + thread; i < end; i += kAbsmaxThreads) most = largest_ftz(most, absmax[i]);
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(~0u, most, offset);
    most = other > most ? other : most;
  }
  if (thread % 32 == 0) of_warp[thread / 32] = most;
  __syncthreads();
  for (const float other : of_warp) most = other > most ? other : most;
  if (thread == 0) nested_absmax[blockIdx.x] = most;
  const float reciprocal = reciprocal_ftz(most);
  for (int64_t i = start + thread; i < end; i += kAbsmaxThreads) {
    codes[i] = static_cast<uint8_t>(nearest_of_256(value, multiply_ftz(absmax[i], reciprocal)));
  }
}

inline void launch_quantize_absmax(const float* absmax, const float* code, int64_t blocksize, int64_t numel,
                                   uint8_t* codes, float* nested_absmax, cudaStream_t stream) {
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  if (blocks == 0) return;
  quantize_absmax_kernel<<<static_cast<unsigned>(blocks), kAbsmaxThreads, 0, stream>>>(absmax, code, blocksize, numel,
                                                                                       codes, nested_absmax);
}

}  // namespace dora_ext
