// NF4 on the device, bit for bit what bitsandbytes computes there. It is built with --use_fast_math: subnormal numbers
// count as zero and 1 / absmax is the approximate reciprocal. The instructions below are those, spelled out.
#pragma once

#include <cfloat>

#include "../nf4.h"
#include "dtype.cuh"

namespace dora_ext {

__device__ const Nf4Codebook kNf4Device = kNf4;
__constant__ const Nf4Codebook kNf4Constant = kNf4;

__device__ __forceinline__ float multiply_ftz(float a, float b) {
  float product;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

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

// 16 bytes of rounded numbers in one store.
__device__ __forceinline__ void store16(float* out, const float (&v)[4]) {
  *reinterpret_cast<float4*>(out) = make_float4(v[0], v[1], v[2], v[3]);
}

template <typename T>
__device__ __forceinline__ void store16(T* out, const float (&v)[8]) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  alignas(16) Pair pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, __half>) {
      pair[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
    } else {
      pair[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    }
  }
  *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(pair);
}

// Where the codes of weights 2i and 2i + 1 lie in a word that was loaded from byte i on: weight k at bit 4 (k ^ 1).
__host__ __device__ constexpr int code_bit(int k) {
  return 4 * (k ^ 1);
}

// offset: what nested_offset returned; loaded once per thread.
template <bool Nested>
__device__ __forceinline__ float scale_at(const Nf4Scales& s, int64_t block, float offset) {
  block += s.first_block;
  if constexpr (!Nested) {
    return static_cast<const float*>(s.absmax)[block];
  } else {
    const float code = s.code[static_cast<const uint8_t*>(s.absmax)[block]];
    return __fadd_rn(multiply_ftz(code, s.nested_absmax[block >> s.nested_shift]), offset);
  }
}

// Without one: -0, which changes no number that it is added to.
template <bool Nested>
__device__ __forceinline__ float nested_offset(const Nf4Scales& s) {
  return Nested && s.offset != nullptr ? *s.offset : -0.f;
}

// ---------------------------------------------------------------------------------------------------------------------
// Dequantisation
//
// A thread turns one small word into one 16-byte store, kDequantizeSteps times, 256 threads apart: 4 bytes -> 8 weights
// (fp16, bf16) or 2 bytes -> 4 weights (fp32). So a warp reads 128 (64) bytes in a row and writes 512 in a row with
// each instruction, and no weight has to change lanes. Lane l holds value l % 16 of the codebook; looking one up is a
// shuffle, which uses only the low four bits of its index, so that codes need no masking, and has no bank conflicts.

constexpr int kDequantizeThreads = 256;
constexpr int kDequantizeSteps = 4;  // with 4 weights a step, a thread block still holds a whole NF4 block of 4096

template <typename T>
constexpr int kDequantizeWeights = 16 / sizeof(T);  // in a word

template <typename T>
using DequantizeWord = std::conditional_t<sizeof(T) == 2, uint32_t, uint16_t>;

// All lanes of the warp take part.
template <typename T>
__device__ __forceinline__ void look_up(uint32_t word, float lane_value, float scale,
                                        float (&weight)[kDequantizeWeights<T>]) {
#pragma unroll
  for (int k = 0; k < kDequantizeWeights<T>; ++k) {
    weight[k] = multiply_ftz(__shfl_sync(~0u, lane_value, word >> code_bit(k), 16), scale);
  }
}

// packed: (ceil(numel / 2),), 4-byte aligned; out: (numel,), 16-byte aligned.
template <typename T, bool Nested>
__device__ __forceinline__ void dequantize_block(const uint8_t* __restrict__ packed, const Nf4Scales& scales,
                                                 int block_shift, int64_t numel, T* __restrict__ out) {
  constexpr int kWeights = kDequantizeWeights<T>, kPerStep = kDequantizeThreads * kWeights;
  const float lane_value = kNf4Device.value[threadIdx.x % 16];
  const int64_t block_start = static_cast<int64_t>(blockIdx.x) * (kPerStep * kDequantizeSteps);
  const int64_t first = block_start + threadIdx.x * kWeights;
  const float offset = nested_offset<Nested>(scales);
  float weight[kWeights];

  if (block_start + kPerStep * kDequantizeSteps <= numel) {
    const auto* words = reinterpret_cast<const DequantizeWord<T>*>(packed + first / 2);
    uint32_t word[kDequantizeSteps];
    float scale[kDequantizeSteps];
#pragma unroll
    for (int s = 0; s < kDequantizeSteps; ++s) word[s] = words[s * kDequantizeThreads];
#pragma unroll
    for (int s = 0; s < kDequantizeSteps; ++s) {
      // block_start is a multiple of every blocksize.
      const unsigned within = (threadIdx.x * kWeights + s * kPerStep) >> block_shift;
      scale[s] = scale_at<Nested>(scales, (block_start >> block_shift) + within, offset);
    }
#pragma unroll
    for (int s = 0; s < kDequantizeSteps; ++s) {
      look_up<T>(word[s], lane_value, scale[s], weight);
      store16(out + first + s * kPerStep, weight);
    }
    return;
  }

  // The last thread block: some threads have no weights, one may have less than a word of them.
#pragma unroll 1
  for (int s = 0; s < kDequantizeSteps; ++s) {
    const int64_t start = first + s * kPerStep, end = start + kWeights < numel ? start + kWeights : numel;
    uint32_t word = 0;
    for (int64_t i = start; i < end; i += 2) word |= uint32_t{packed[i / 2]} << (4 * (i - start));
    const float scale = start < numel ? scale_at<Nested>(scales, start >> block_shift, offset) : 0.f;
    look_up<T>(word, lane_value, scale, weight);
#pragma unroll
    for (int k = 0; k < kWeights; ++k) {
      if (start + k < end) out[start + k] = narrow<T>(weight[k]);
    }
  }
}

template <typename T, bool Nested>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_nf4_kernel(const uint8_t* __restrict__ packed, Nf4Scales scales, int block_shift, int64_t numel,
                          T* __restrict__ out) {
  dequantize_block<T, Nested>(packed, scales, block_shift, numel, out);
}

template <typename T>
constexpr int64_t kDequantizeBlock = kDequantizeThreads * kDequantizeSteps * kDequantizeWeights<T>;

template <typename T>
void launch_dequantize_nf4(const uint8_t* packed, const Nf4Scales& scales, int64_t blocksize, int64_t numel, T* out,
                           cudaStream_t stream) {
  const int64_t blocks = (numel + kDequantizeBlock<T> - 1) / kDequantizeBlock<T>;
  if (blocks == 0) return;
  const auto kernel = scales.nested_absmax ? dequantize_nf4_kernel<T, true> : dequantize_nf4_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kDequantizeThreads, 0, stream>>>(packed, scales, shift_of(blocksize), numel,
                                                                           out);
}

// ---------------------------------------------------------------------------------------------------------------------
// Quantisation
//
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
