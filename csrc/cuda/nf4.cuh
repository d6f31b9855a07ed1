// NF4 on the device, bit for bit what bitsandbytes computes there. It is built with --use_fast_math: subnormal numbers
// count as zero and 1 / absmax is the approximate reciprocal. The instructions below are those, spelled out.
#pragma once

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

// 16 bytes of rounded numbers in one store. Streamed: the first to leave the caches.
template <bool Streamed>
__device__ __forceinline__ void store16(uint4* out, const uint4& v) {
  if constexpr (Streamed) {
    __stcs(out, v);
  } else {
    *out = v;
  }
}

template <bool Streamed>
__device__ __forceinline__ void store16(float* out, const float (&v)[4]) {
  store16<Streamed>(reinterpret_cast<uint4*>(out), make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                                              __float_as_uint(v[2]), __float_as_uint(v[3])));
}

template <bool Streamed, typename T>
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
  store16<Streamed>(reinterpret_cast<uint4*>(out), *reinterpret_cast<const uint4*>(pair));
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
// A thread turns one small word into one 16-byte store, kDequantizeSteps times, 512 threads apart: 4 bytes -> 8 weights
// (fp16, bf16) or 2 bytes -> 4 weights (fp32). So a warp reads 128 (64) bytes in a row and writes 512 in a row with
// each instruction, and no weight has to change lanes. Lane l holds value l % 16 of the codebook; looking one up is a
// shuffle, which uses only the low four bits of its index, so that codes need no masking, and has no bank conflicts.

constexpr int kDequantizeThreads = 512;
constexpr int kDequantizeSteps = 2;  // with 4 weights a step, a thread block still holds a whole NF4 block of 4096

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

// What each row is multiplied with, after it has been rounded to the weight's dtype.
struct RowGain {
  const float* gain;  // null: nothing
  int64_t columns;    // of a row
  bool short_index;   // every index fits in 32 bits: a division takes a fifth of the time

  __device__ __forceinline__ float at(int64_t weight) const {
    return gain[short_index ? static_cast<uint32_t>(weight) / static_cast<uint32_t>(columns) : weight / columns];
  }

  // N weights from number `first` on.
  template <typename T, int N>
  __device__ __forceinline__ void apply(float (&weight)[N], int64_t first, int64_t numel) const {
    const bool one_row = columns % N == 0;
    float g = one_row ? at(first) : 0.f;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (!one_row) g = first + k < numel ? at(first + k) : 0.f;
      weight[k] = g * widen(narrow<T>(weight[k]));
    }
  }
};

// packed: (ceil(numel / 2),), 4-byte aligned; out: (numel,), 16-byte aligned. Streamed: `out` is more than a cache
// should keep.
template <typename T, bool Nested, bool Streamed, bool Scaled = false>
__device__ __forceinline__ void dequantize_block(const uint8_t* __restrict__ packed, const Nf4Scales& scales,
                                                 int block_shift, int64_t numel, T* __restrict__ out,
                                                 const RowGain& rows = {}) {
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
    for (int s = 0; s < kDequantizeSteps; ++s) word[s] = __ldcs(words + s * kDequantizeThreads);
#pragma unroll
    for (int s = 0; s < kDequantizeSteps; ++s) {
      // block_start is a multiple of every blocksize.
      const unsigned within = (threadIdx.x * kWeights + s * kPerStep) >> block_shift;
      scale[s] = scale_at<Nested>(scales, (block_start >> block_shift) + within, offset);
    }
#pragma unroll
    for (int s = 0; s < kDequantizeSteps; ++s) {
      look_up<T>(word[s], lane_value, scale[s], weight);
      if constexpr (Scaled) rows.apply<T>(weight, first + s * kPerStep, numel);
      store16<Streamed>(out + first + s * kPerStep, weight);
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
    if constexpr (Scaled) {
      if (start < numel) rows.apply<T>(weight, start, numel);
    }
#pragma unroll
    for (int k = 0; k < kWeights; ++k) {
      if (start + k < end) out[start + k] = narrow<T>(weight[k]);
    }
  }
}

template <typename T, bool Nested, bool Scaled>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_nf4_kernel(const uint8_t* __restrict__ packed, Nf4Scales scales, int block_shift, int64_t numel,
                          T* __restrict__ out, RowGain rows) {
  dequantize_block<T, Nested, true, Scaled>(packed, scales, block_shift, numel, out, rows);
}

template <typename T>
constexpr int64_t kDequantizeBlock = kDequantizeThreads * kDequantizeSteps * kDequantizeWeights<T>;

template <typename T>
void launch_dequantize_nf4(const uint8_t* packed, const Nf4Scales& scales, int64_t blocksize, int64_t numel, T* out,
                           const RowGain& rows, cudaStream_t stream) {
  const int64_t blocks = (numel + kDequantizeBlock<T> - 1) / kDequantizeBlock<T>;
  if (blocks == 0) return;
  const bool nested = scales.nested_absmax != nullptr;
  const auto kernel = rows.gain == nullptr
                          ? (nested ? dequantize_nf4_kernel<T, true, false> : dequantize_nf4_kernel<T, false, false>)
                          : (nested ? dequantize_nf4_kernel<T, true, true> : dequantize_nf4_kernel<T, false, true>);
  kernel<<<static_cast<unsigned>(blocks), kDequantizeThreads, 0, stream>>>(packed, scales, shift_of(blocksize), numel,
                                                                           out, rows);
}

}  // namespace dora_ext
