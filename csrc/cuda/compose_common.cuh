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

// `low` = s h B^T.
template <typename Acc>
__device__ __forceinline__ Acc compose_value(Acc base, Acc low, Acc gain, Acc bias, bool delta) {
  return delta ? (gain - 1) * (base - bias) + gain * low : gain * (base + low) + bias;
}

// N numbers that are read and written at once; N = 1 for pointers that allow no more.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace dora_ext
