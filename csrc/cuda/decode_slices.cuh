// The first launch of decode_nf4_ring.cuh: h in parts of 1024 columns each, which the second adds up. With few blocks
// of few registers it begins while the layer before is not done, and what it waits for then comes at once: one block
// for a row of A, which adds up all itself (decode.cuh), is done 4 us later at 14336 columns.
#pragma once

#include "decode.cuh"

namespace dora_ext {

constexpr int kDecodeSlice = 1024, kDecodeSliceWarps = 8, kDecodeSliceRanks = 16;
constexpr int kDecodeSumPitch = 20;  // of 16 rows: no bank conflict where lanes write their fragments

template <typename T>
__host__ __device__ int64_t decode_slices(const DecodeProblem<T>& p) {
  return (p.in + kDecodeSlice - 1) / kDecodeSlice;
}

// Eight numbers of fp32 as two each of bf16, which leave out 2^-17 of them.
struct SplitNumbers {
  uint4 rounded, rest;

  __device__ explicit SplitNumbers(const float* eight) {
    uint32_t first[4], second[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = load16_if(true, eight + 4 * half);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = __uint_as_float(word_of(four, 2 * i)), high = __uint_as_float(word_of(four, 2 * i + 1));
        const uint32_t both = pack<__nv_bfloat16>(low, high);
        const float2 as_rounded = unpack<__nv_bfloat16>(both);
        first[2 * half + i] = both;
        second[2 * half + i] = pack<__nv_bfloat16>(low - as_rounded.x, high - as_rounded.y);
      }
    }
    rounded = make_uint4(first[0], first[1], first[2], first[3]);
    rest = make_uint4(second[0], second[1], second[2], second[3]);
  }
};

// sum += A x^T over 32 columns, as multiply_columns has them; fp32 only beside bf16: fp16 has not its range.
template <typename T, typename A>
__device__ __forceinline__ void multiply_adapter(float (&sum)[4], const A* top, const A* bottom, const uint4& x) {
  if constexpr (std::is_same_v<A, T>) {
    multiply_columns<T>(sum, load16_if(true, top), load16_if(true, bottom), x);
  } else {
    const SplitNumbers upper(top), lower(bottom);
    multiply_columns<T>(sum, upper.rounded, lower.rounded, x);
    multiply_columns<T>(sum, upper.rest, lower.rest, x);
  }
}

// Block (slice, 16 ranks): a warp has 128 columns. parts: (slices, tokens, r)
template <typename T, typename A>
__global__ void __launch_bounds__(32 * kDecodeSliceWarps) decode_slices_kernel(DecodeProblem<T> p, float* parts) {
  __shared__ float of_warp[kDecodeSliceWarps][kDecodeTokens][kDecodeSumPitch];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, group = thread % 32 / 4, t = thread % 4;
  const int rank0 = static_cast<int>(blockIdx.y) * kDecodeSliceRanks,
            column0 = static_cast<int>(blockIdx.x) * kDecodeSlice;
  const auto row_of = [&](int i) {  // behind the last, the first: it is not used
    return static_cast<const A*>(p.lora_A.data) + static_cast<int64_t>(rank0 + i < p.rank ? rank0 + i : 0) * p.in;
  };
  // A may have just been written: into L2, where what is written comes by, it may be brought at once. 16 threads a row.
  for (int column = column0 + thread % 16 * (128 / sizeof(A)); column < p.in && column < column0 + kDecodeSlice;
       column += 16 * (128 / sizeof(A))) {
    prefetch_to_l2(row_of(thread / 16) + column);
  }
  // As in decode_adapter_kernel.
  wait_for_previous_launch();
  allow_next_launch();
  float sum[4] = {};
  const A *top = row_of(group) + 8 * t, *bottom = row_of(group + 8) + 8 * t;
  const T* token = p.x + static_cast<int64_t>(group) * p.in + 8 * t;
  const int column = column0 + 128 * warp;
  if (column < p.in) {  // for all 128: `in` is a multiple of 256
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = load16_if(group < p.tokens, token + column + 32 * i);
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply_adapter<T, A>(sum, top + column + 32 * i, bottom + column + 32 * i, x[i]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) of_warp[warp][2 * t + i % 2][group + i / 2 * 8] = sum[i];
  __syncthreads();
  const int rank = thread / kDecodeTokens, of = thread % kDecodeTokens;
  if (rank >= kDecodeSliceRanks || rank0 + rank >= p.rank || of >= p.tokens) return;
  float total = 0;
#pragma unroll
  for (int i = 0; i < kDecodeSliceWarps; ++i) total += of_warp[i][of][rank];
  parts[(static_cast<int64_t>(blockIdx.x) * p.tokens + of) * p.rank + rank0 + rank] = total;
}

template <typename T>
void launch_decode_slices(const DecodeProblem<T>& p, float* parts, cudaStream_t stream) {
  const dim3 slices(static_cast<unsigned>(decode_slices(p)),
                    static_cast<unsigned>((p.rank + kDecodeSliceRanks - 1) / kDecodeSliceRanks));
  auto adapter = decode_slices_kernel<T, T>;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (p.lora_A.dtype == Dtype::kFloat) adapter = decode_slices_kernel<T, float>;
  }
  launch_beside(adapter, slices, 32 * kDecodeSliceWarps, 0, stream, p, parts);
}

}  // namespace dora_ext
