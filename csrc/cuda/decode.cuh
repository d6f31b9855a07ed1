// A whole DoRA linear layer for 1 to 8 tokens: h = x A^T, y = g * (x W^T + s h B^T) + bias. This file has all but the
// products with W; those are in decode_dense.cuh and decode_nf4.cuh.
//
// Two launches that overlap. The first has a thread block per row of A and is over in a few microseconds; the second
// streams W, which takes longer, and asks for h only at its end. On sm_90 it starts together with the first
// (programmatic dependent launch). One launch would have each block compute h again, and that is r rows of A beside the
// 16 rows of W that a block has.
//
// A block has 16 rows of W, its warps take turns along them, and their sums are added in the order of the warps: the
// same bits each time. W is the left operand of the tensor cores, its rows the 16 of the product; the tokens are its 8
// columns. For one token that costs nothing, because reading W takes longer. The order of k inside a product is free as
// long as both operands have it, so that a lane can take bytes as they lie in memory for its fragments.
#pragma once

#include "../decode.h"
#include "dtype.cuh"
#include "launches.cuh"
#include "mma.cuh"

namespace dora_ext {

template <typename T>
struct DecodeProblem {
  const T* x;            // (tokens, in), 16-byte aligned
  FeatureVector lora_A;  // (r, in), 16-byte aligned, of T or float
  FeatureVector lora_B;  // (out, r), like gain and bias in fp32 or 16 bits
  FeatureVector gain;    // (out,)
  FeatureVector bias;    // (out,) or null
  T* h;                  // (tokens, r)
  T* y;                  // (tokens, out)
  int tokens, in, rank;
  int64_t out;
  float scaling;
};

// Word i of four; i is a constant after unrolling.
__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Zeros where `p` must not be read.
__device__ __forceinline__ uint4 load16_if(bool inside, const void* p) {
  return inside ? __ldg(static_cast<const uint4*>(p)) : uint4{};
}

// ---------------------------------------------------------------------------------------------------------------------
// h

constexpr int kDecodeAdapterThreads = 256, kDecodeAdapterTokens = 4;  // whose x is loaded at a time

// Block i: h[:, i]. Registers are few, so that it leaves its multiprocessors room for as many blocks of the next launch
// as the others have.
template <typename T, typename A>
__global__ void __launch_bounds__(kDecodeAdapterThreads) decode_adapter_kernel(DecodeProblem<T> p) {
  constexpr int kWords = sizeof(A) / 2;  // of 16 bytes, that hold 8 numbers
  __shared__ float of_warp[kDecodeAdapterThreads / 32][kDecodeTokens];
  // The next launch reads more than this one writes: nothing of it may begin before what came before this one is done.
  wait_for_previous_launch();
  allow_next_launch();
  const int thread = static_cast<int>(threadIdx.x), row = static_cast<int>(blockIdx.x);
  const A* lora_A = static_cast<const A*>(p.lora_A.data) + static_cast<int64_t>(row) * p.in;
#pragma unroll 1
  for (int first = 0; first < p.tokens; first += kDecodeAdapterTokens) {
    float sum[kDecodeAdapterTokens] = {};
#pragma unroll 1
    for (int k = 8 * thread; k < p.in; k += 8 * kDecodeAdapterThreads) {
      uint4 a[kWords], x[kDecodeAdapterTokens];
#pragma unroll
      for (int i = 0; i < kWords; ++i) a[i] = load16_if(true, lora_A + k + i * (16 / sizeof(A)));
#pragma unroll
      for (int i = 0; i < kDecodeAdapterTokens; ++i) {
        x[i] = load16_if(first + i < p.tokens, p.x + static_cast<int64_t>(first + i) * p.in + k);
      }
#pragma unroll
      for (int i = 0; i < kDecodeAdapterTokens; ++i) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          float2 factor;
          if constexpr (sizeof(A) == 4) {
            const int word = pair % 2 * 2;
            factor.x = __uint_as_float(word_of(a[pair / 2], word));
            factor.y = __uint_as_float(word_of(a[pair / 2], word + 1));
          } else {
            factor = unpack<A>(word_of(a[0], pair));
          }
          const float2 two = unpack<T>(word_of(x[i], pair));
          sum[i] = fmaf(factor.x, two.x, fmaf(factor.y, two.y, sum[i]));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDecodeAdapterTokens; ++i) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
      if (thread % 32 == 0) of_warp[thread / 32][first + i] = sum[i];
    }
  }
  __syncthreads();
  if (thread < p.tokens) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kDecodeAdapterThreads / 32; ++warp) total += of_warp[warp][thread];
    p.h[static_cast<int64_t>(thread) * p.rank + row] = narrow<T>(total);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The end of a block of rows

// A number as it lies in memory, fp32 or 16 bits: what is widened at once is waited for at once.
__device__ __forceinline__ uint32_t load_bits(const FeatureVector& v, int64_t i) {
  return v.dtype == Dtype::kFloat ? __ldg(static_cast<const uint32_t*>(v.data) + i)
                                  : uint32_t{__ldg(static_cast<const uint16_t*>(v.data) + i)};
}

__device__ __forceinline__ float widen_bits(uint32_t bits, Dtype dtype) {
  return dtype == Dtype::kFloat  ? __uint_as_float(bits)
         : dtype == Dtype::kHalf ? unpack<__half>(bits).x
                                 : unpack<__nv_bfloat16>(bits).x;
}

template <int kWarps>
using DecodeSums = float[kWarps][kDecodeTokens][kDecodeRows];

// A row of W has kLanes threads: they share its row of B, and those below the number of tokens write a result. Made at
// the start, while W is on its way: it asks for what the end needs but h.
template <typename T, int kWarps>
class DecodeEnd {
 public:
  __device__ explicit DecodeEnd(const DecodeProblem<T>& p) : p_(p) {
    const int64_t row = result_row() < p.out ? result_row() : p.out - 1;
#pragma unroll
    for (int j = 0; j < kEarly; ++j) {
      const int i = lane() + j * kLanes;
      B_[j] = i < p.rank ? load_bits(p.lora_B, row * p.rank + i) : 0;
    }
    gain_ = load_bits(p.gain, row);
    bias_ = p.bias.data != nullptr ? load_bits(p.bias, row) : 0;
  }

  // sum: this lane's fragment of W x^T over what its warp had; times `factor`. of_warp: shared memory.
  __device__ void finish(const float (&sum)[4], float factor, DecodeSums<kWarps>& of_warp) const {
    const int thread = static_cast<int>(threadIdx.x), group = thread % 32 / 4, t = thread % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) of_warp[thread / 32][2 * t + i % 2][group + i / 2 * 8] = sum[i];
    wait_for_previous_launch();
    float adapter[kDecodeTokens] = {};
#pragma unroll
    for (int j = 0; j < kEarly; ++j) add(lane() + j * kLanes, B_[j], adapter);
    const int64_t row = result_row() < p_.out ? result_row() : p_.out - 1;
    for (int i = lane() + kEarly * kLanes; i < p_.rank; i += kLanes) {
      add(i, load_bits(p_.lora_B, row * p_.rank + i), adapter);
    }
    float own = 0;
#pragma unroll
    for (int token = 0; token < kDecodeTokens; ++token) {
      if (token < p_.tokens) {
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
          adapter[token] += __shfl_xor_sync(~0u, adapter[token], offset, kLanes);
        }
        if (lane() == token) own = adapter[token];
      }
    }
    __syncthreads();
    if (lane() >= p_.tokens || result_row() >= p_.out) return;
    float u = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) u += of_warp[warp][lane()][thread / kLanes];
    const float bias = p_.bias.data != nullptr ? widen_bits(bias_, p_.bias.dtype) : 0.f;
    const float result = fmaf(widen_bits(gain_, p_.gain.dtype), fmaf(p_.scaling, own, factor * u), bias);
    p_.y[lane() * p_.out + result_row()] = narrow<T>(result);
  }

 private:
  static constexpr int kLanes = 32 * kWarps / kDecodeRows;
  static constexpr int kEarly = 32 / kLanes;  // of a row of B, per lane: all of it up to rank 32
  static_assert(kLanes >= kDecodeTokens && kLanes <= 32, "a lane per token, in one warp");

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  __device__ static int64_t result_row() {
    return static_cast<int64_t>(blockIdx.x) * kDecodeRows + static_cast<int>(threadIdx.x) / kLanes;
  }

  __device__ __forceinline__ void add(int i, uint32_t B, float (&adapter)[kDecodeTokens]) const {
    const float factor = widen_bits(B, p_.lora_B.dtype);
#pragma unroll
    for (int token = 0; token < kDecodeTokens; ++token) {
      if (token < p_.tokens && i < p_.rank) {
        adapter[token] = fmaf(factor, widen(p_.h[static_cast<int64_t>(token) * p_.rank + i]), adapter[token]);
      }
    }
  }

  const DecodeProblem<T>& p_;
  uint32_t B_[kEarly], gain_, bias_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Launch

template <typename T, typename A>
void launch_decode_adapter(const DecodeProblem<T>& p, cudaStream_t stream) {
  launch_beside(decode_adapter_kernel<T, A>, static_cast<unsigned>(p.rank), kDecodeAdapterThreads, 0, stream, p);
}

// h, and then y by `kernel`, which takes the problem and its weight.
template <typename T, typename Weight>
void launch_decode_as(void (*kernel)(DecodeProblem<T>, Weight), const DecodeProblem<T>& p, const Weight& weight,
                      unsigned threads, size_t shared, cudaStream_t stream) {
  if (p.lora_A.dtype == Dtype::kFloat) {
    launch_decode_adapter<T, float>(p, stream);
  } else {
    launch_decode_adapter<T, T>(p, stream);
  }
  allow_shared(kernel, shared);
  launch_beside(kernel, static_cast<unsigned>((p.out + kDecodeRows - 1) / kDecodeRows), threads, shared, stream, p,
                weight);
}

}  // namespace dora_ext
