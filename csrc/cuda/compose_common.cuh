// What the compose kernels share: the problem, the formula, and vectors of 16 bytes.
#pragma once

#include <cstdint>

#include "dtype.cuh"

namespace dora_ext {

// result = g * (base + s h B^T) + bias, or with `delta` (g - 1) * (base - bias) + g * s h B^T.
// Features last:   base, result (tokens, out)         h (tokens, rank)
// Channels first:  base, result (batch, out, length)  h (batch, rank, length)
template <typename T>
struct ComposeProblem {
  using Acc = accumulate_t<T>;
  const T* base;        // see above; (any, out) with `rows`
  T* result;            // may be base: each element is read and written by the same thread
  const T* h;           //
  const T* lora_B;      // (out, rank)
  const Acc* gain;      // (out,)
  FeatureVector bias;   // (out,), data null for none
  const int64_t* rows;  // (tokens,), null: token t reads base's row rows[t]; -1 gives a row of NaN. Features last only.
  int64_t tokens;       // features last
  int64_t batch, length;  // channels first
  int64_t out;
  int rank;
  Acc scaling, gain_factor;  // the gain in use is gain_factor * gain
  bool delta;
};

// One feature's part of the formula, both forms in one: value * (base - before) + product * (h B^T) + after.
template <typename Acc>
struct ComposeFactors {
  Acc value, product, before, after;

  __device__ __forceinline__ Acc apply(Acc base, Acc hB) const {
    return fma(value, base - before, fma(product, hB, after));
  }
};

// Zeros from `out` on.
template <typename T, typename Acc = accumulate_t<T>>
__device__ __forceinline__ ComposeFactors<Acc> compose_factors(const ComposeProblem<T>& p, int64_t feature) {
  if (feature >= p.out) return {};
  const Acc gain = p.gain[feature] * p.gain_factor;
  const Acc bias = p.bias.data != nullptr ? p.bias.template at<Acc>(feature) : Acc(0);
  if (p.delta) return {gain - 1, gain * p.scaling, bias, 0};
  return {gain, gain * p.scaling, 0, bias};
}

// N numbers that are read and written at once; N = 1 for pointers that allow no more.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

// To global memory, as one access of 16 bytes where it can be: the compiler takes struct copies apart when it moves
// them over branches.
template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof(pack) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack) / 16); ++i) {
      __stwb(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(&pack)[i]);
    }
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
}

__host__ __device__ inline bool on_16_bytes(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <typename I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace dora_ext
