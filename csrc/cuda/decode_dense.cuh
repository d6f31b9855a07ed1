// The products of decode.cuh with a dense W.
//
// With g = lane / 4 and t = lane % 4 (see mma.cuh), one step of a warp covers 64 columns: lane t has columns
// 8t ... 8t + 7 and 32 + 8t ... 32 + 8t + 7 of rows g and g + 8, and of x, token g, the same columns. Beyond `in` all
// is zero.
#pragma once

#include "decode.cuh"

namespace dora_ext {

// 16 bytes that are used once: past L1, where x is to stay.
__device__ __forceinline__ uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

template <typename T>
struct DenseDecodeStep {
  uint4 top[2], bottom[2], x[2];

  // Rows and token from column 0 on.
  __device__ __forceinline__ void load(const T* top_row, const T* bottom_row, const T* token, int column, int in) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int at = column + 32 * v + threadIdx.x % 4 * 8;
      const bool inside = at < in;
      top[v] = inside ? load_streaming(top_row + at) : uint4{};
      bottom[v] = inside ? load_streaming(bottom_row + at) : uint4{};
      x[v] = load16_if(inside && token != nullptr, token + at);
    }
  }

  __device__ __forceinline__ void multiply(float (&sum)[4]) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) multiply_columns<T>(sum, top[v], bottom[v], x[v]);
  }
};

// weight: (out, in), 16-byte aligned; in is a multiple of 8.
template <typename T, int kWarps, int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, blocks_on_hopper(kBlocks))
    decode_dense_kernel(DecodeProblem<T> p, const T* weight) {
  constexpr int kStride = kWarps * 64;
  __shared__ DecodeSums<kWarps> of_warp;
  const int group = static_cast<int>(threadIdx.x) % 32 / 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDecodeRows;
  const int64_t end = first + kDecodeRows < p.out ? first + kDecodeRows : p.out;
  // The last block may have fewer rows; what is read in their place is not written.
  const T* top = weight + (first + group < end ? first + group : end - 1) * p.in;
  const T* bottom = weight + (first + group + 8 < end ? first + group + 8 : end - 1) * p.in;
  const T* token = group < p.tokens ? p.x + static_cast<int64_t>(group) * p.in : nullptr;

  DenseDecodeStep<T> step;
  int column = static_cast<int>(threadIdx.x) / 32 * 64;
  step.load(top, bottom, token, column, p.in);
  const DecodeEnd<T, kDecodeEndLanes<kWarps>> finisher(p, first, static_cast<int>(threadIdx.x));
  float sum[4] = {};
  for (; column < p.in; column += kStride) {
    const DenseDecodeStep<T> here = step;
    step.load(top, bottom, token, column + kStride, p.in);
    here.multiply(sum);
  }
  finish_decode<T, kWarps>(p, finisher, sum, 1.f, of_warp);
}

// in: a multiple of 8. 1 to 8 tokens, rank and out at least 1. Where a multiprocessor has no more than two blocks, more
// warps in each keep it busier (measured on an H100: 7.9 against 9.7 us at 1024 rows of 4096, 15.1 against 15.5 at
// 4096, but 44.0 against 43.0 at 14336).
template <typename T>
void launch_decode(const DecodeProblem<T>& p, const T* weight, int multiprocessors, cudaStream_t stream) {
  if (p.out <= 2 * multiprocessors * kDecodeRows) {
    launch_decode_as(decode_dense_kernel<T, 16, 2>, p, weight, 512, 0, stream);
  } else {
    launch_decode_as(decode_dense_kernel<T, 8, 4>, p, weight, 256, 0, stream);
  }
}

}  // namespace dora_ext
