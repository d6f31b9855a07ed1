// A whole DoRA linear layer for 1 to 8 tokens: h = x A^T, y = g * (x W^T + s h B^T) + bias. This file has all but the
// products with W; those are in decode_dense.cuh, decode_nf4.cuh and, for Hopper, decode_nf4_ring.cuh.
//
// Two launches that overlap. The first has a thread block per row of A and is over in a few microseconds; the second
// streams W, which takes longer, and asks for h only at its end. On sm_90 it starts together with the first
// (programmatic dependent launch). One launch would have each block compute h again, and that is r rows of A beside the
// 16 rows of W that a block has; clusters that share h took 10 us of 25 for 14336 columns.
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

// sum += W x^T over 32 columns, of which a lane has eight numbers of rows g and g + 8 and of token g.
template <typename T>
__device__ __forceinline__ void multiply_columns(float (&sum)[4], const uint4& top, const uint4& bottom,
                                                 const uint4& x) {
#pragma unroll
  for (int m = 0; m < 4; m += 2) {
    const uint32_t a[4] = {word_of(top, m), word_of(bottom, m), word_of(top, m + 1), word_of(bottom, m + 1)};
    const uint32_t b[2] = {word_of(x, m), word_of(x, m + 1)};
    mma_m16n8k16<T>(sum, a, b);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// h

constexpr int kDecodeAdapterWarps = 8, kDecodeAdapterTokens = 4;  // whose x is loaded at a time

// Block i: h[:, i]. Registers are few, so that it leaves its multiprocessors room for as many blocks of the next launch
// as the others have.
template <typename T, typename A>
__global__ void __launch_bounds__(32 * kDecodeAdapterWarps) decode_adapter_kernel(DecodeProblem<T> p) {
  __shared__ float of_warp[kDecodeAdapterWarps][kDecodeTokens];
  // The next launch reads more than this one writes: nothing of it may begin before what came before this one is done.
  wait_for_previous_launch();
  allow_next_launch();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, row = static_cast<int>(blockIdx.x);
  constexpr int kTokens = kDecodeAdapterTokens, kWords = sizeof(A) / 2;  // of 16 bytes, that hold 8 numbers
  const A* lora_A = static_cast<const A*>(p.lora_A.data) + static_cast<int64_t>(row) * p.in;
#pragma unroll 1
  for (int token = 0; token < p.tokens; token += kTokens) {
    float sum[kTokens] = {};
#pragma unroll 1
    for (int k = 8 * thread; k < p.in; k += 256 * kDecodeAdapterWarps) {
      uint4 a[kWords], x[kTokens];
#pragma unroll
      for (int i = 0; i < kWords; ++i) a[i] = load16_if(true, lora_A + k + i * (16 / sizeof(A)));
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        x[i] = load16_if(token + i < p.tokens, p.x + static_cast<int64_t>(token + i) * p.in + k);
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
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
    for (int i = 0; i < kTokens; ++i) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
      if (thread % 32 == 0) of_warp[warp][token + i] = sum[i];
    }
  }
  __syncthreads();
  if (thread < p.tokens) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < kDecodeAdapterWarps; ++i) total += of_warp[i][thread];
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

// The results of 16 rows: a row has kLanes threads, which share its row of B, and those below the number of tokens
// write one each. Made while W is on its way: it asks for what the end needs but h.
template <typename T, int kLanes>
class DecodeEnd {
 public:
  // thread: of 16 kLanes
  __device__ __forceinline__ DecodeEnd(const DecodeProblem<T>& p, int64_t first, int thread) : lane_(thread % kLanes) {
    row_ = first + thread / kLanes;
    const int64_t row = row_of_B(p);
#pragma unroll
    for (int j = 0; j < kEarly; ++j) {
      const int i = lane_ + j * kLanes;
      B_[j] = i < p.rank ? load_bits(p.lora_B, row * p.rank + i) : 0;
    }
    gain_ = load_bits(p.gain, row);
    bias_ = p.bias.data != nullptr ? load_bits(p.bias, row) : 0;
  }

  // (h B^T)[token, row] of this thread. hidden(token, i): h
  template <typename Hidden>
  __device__ __forceinline__ float of_adapter(const DecodeProblem<T>& p, const Hidden& hidden) const {
    if (p.tokens == 1) return sums<1>(p, hidden)[0];
    const Sums<kDecodeTokens> of_token = sums<kDecodeTokens>(p, hidden);
    float own = 0;
#pragma unroll
    for (int token = 0; token < kDecodeTokens; ++token) {
      // own = lane_ == token ? of_token[token] : own, of which the compiler makes an index into memory
      asm("{\n.reg .pred own;\nsetp.eq.s32 own, %2, %3;\nselp.f32 %0, %1, %0, own;\n}\n"
          : "+f"(own)
          : "f"(of_token[token]), "r"(lane_), "r"(token));
    }
    return own;
  }

  // of_base: (x W^T)[token, row]
  __device__ __forceinline__ void write(const DecodeProblem<T>& p, float of_base, float of_adapter) const {
    if (lane_ >= p.tokens || row_ >= p.out) return;
    const float bias = p.bias.data != nullptr ? widen_bits(bias_, p.bias.dtype) : 0.f;
    const float result = fmaf(widen_bits(gain_, p.gain.dtype), fmaf(p.scaling, of_adapter, of_base), bias);
    p.y[lane_ * p.out + row_] = narrow<T>(result);
  }

  __device__ int lane() const { return lane_; }

 private:
  static constexpr int kEarly = 32 / kLanes;  // of a row of B, per lane: all of it up to rank 32
  static_assert(kLanes >= kDecodeTokens && kLanes <= 32, "a lane per token, in one warp");

  template <int kTokens>
  struct Sums {
    float of[kTokens] = {};
    __device__ float& operator[](int token) { return of[token]; }
    __device__ float operator[](int token) const { return of[token]; }
  };

  // In all lanes of a row.
  template <int kTokens, typename Hidden>
  __device__ __forceinline__ Sums<kTokens> sums(const DecodeProblem<T>& p, const Hidden& hidden) const {
    Sums<kTokens> sum;
    const auto add = [&](int i, uint32_t B) {
      const float factor = widen_bits(B, p.lora_B.dtype);
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        if (token < p.tokens && i < p.rank) sum[token] = fmaf(factor, hidden(token, i), sum[token]);
      }
    };
#pragma unroll
    for (int j = 0; j < kEarly; ++j) add(lane_ + j * kLanes, B_[j]);
    for (int i = lane_ + kEarly * kLanes; i < p.rank; i += kLanes) {
      add(i, load_bits(p.lora_B, row_of_B(p) * p.rank + i));
    }
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (token < p.tokens) {
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
          sum[token] += __shfl_xor_sync(~0u, sum[token], offset, kLanes);
        }
      }
    }
    return sum;
  }

  // Behind the last row, there is the last.
  __device__ int64_t row_of_B(const DecodeProblem<T>& p) const { return row_ < p.out ? row_ : p.out - 1; }

  int64_t row_;
  int lane_;
  uint32_t B_[kEarly], gain_, bias_;
};

template <int kWarps>
using DecodeSums = float[kWarps][kDecodeTokens][kDecodeRows];

// The end of a block that has only these 16 rows. sum: this lane's fragment of W x^T over what its warp had; times
// `factor`. of_warp: shared memory.
template <typename T, int kWarps, typename End>
__device__ __forceinline__ void finish_decode(const DecodeProblem<T>& p, const End& end, const float (&sum)[4],
                                              float factor, DecodeSums<kWarps>& of_warp) {
  const int thread = static_cast<int>(threadIdx.x), group = thread % 32 / 4, t = thread % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) of_warp[thread / 32][2 * t + i % 2][group + i / 2 * 8] = sum[i];
  wait_for_previous_launch();
  const float of_adapter =
      end.of_adapter(p, [&](int token, int i) { return widen(p.h[static_cast<int64_t>(token) * p.rank + i]); });
  __syncthreads();
  float u = 0;
  if (end.lane() < p.tokens) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) u += of_warp[warp][end.lane()][thread * kDecodeRows / (32 * kWarps)];
  }
  end.write(p, factor * u, of_adapter);
}

template <int kWarps>
constexpr int kDecodeEndLanes = 32 * kWarps / kDecodeRows;

// ---------------------------------------------------------------------------------------------------------------------
// Launch

// h, and then y by `kernel`, which takes the problem and its weight.
template <typename T, typename Weight>
void launch_decode_as(void (*kernel)(DecodeProblem<T>, Weight), const DecodeProblem<T>& p, const Weight& weight,
                      unsigned threads, size_t shared, cudaStream_t stream) {
  const auto adapter = p.lora_A.dtype == Dtype::kFloat ? decode_adapter_kernel<T, float> : decode_adapter_kernel<T, T>;
  launch_beside(adapter, static_cast<unsigned>(p.rank), 32 * kDecodeAdapterWarps, 0, stream, p);
  allow_shared(kernel, shared);
  launch_beside(kernel, static_cast<unsigned>((p.out + kDecodeRows - 1) / kDecodeRows), threads, shared, stream, p,
                weight);
}

}  // namespace dora_ext
