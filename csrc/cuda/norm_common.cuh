// What the norm kernels share. All of them form tiles of W + s B A, square them and add them up along `in`; a block
// writes one sum of squares for each of its features to its row of `partials`. The finishing kernel adds the rows in
// their order (the same bits each time), takes the root and divides. A second launch rather than a ticket: tickets need
// memory that is zero before, which costs a launch too. Clusters that add up each other's sums in shared memory, and
// finish them, took 1 us longer than the two launches, which overlap.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtype.cuh"
#include "launches.cuh"
#include "mma.cuh"

namespace dora_ext {

template <typename T>
struct NormProblem {
  const T* weight;  // (out, in), or (in, out) when transposed
  const T* lora_A;  // (rank, in), rows pitch_A apart; zeros between in and pitch_A
  const T* lora_B;  // (out, rank)
  int64_t out, in, pitch_A;
  int rank;
  accumulate_t<T> scaling;
  accumulate_t<T>* partials;   // (splits, out)
  const int64_t* fingerprint;  // null, or what fingerprint_kernel left: not stale means there is nothing to compute
};

// A fingerprint is int64[4]: stored hash | running hash | ticket (low half), stale (high half) | norms computed.
__device__ __forceinline__ bool is_stale(const int64_t* fingerprint) {
  return fingerprint == nullptr || (fingerprint[2] >> 32) != 0;
}

// A norm kernel's first step, beside the launch before it: is there anything to compute?
__device__ __forceinline__ bool norm_begins(const int64_t* fingerprint) {
  allow_next_launch();  // the finish is set up meanwhile
  wait_for_previous_launch();
  return is_stale(fingerprint);
}

// ---------------------------------------------------------------------------------------------------------------------
// Device pieces

// Shared memory that a block can have on the architecture being compiled for: kernels whose tiles need more are left
// empty there, and the plan never picks them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int64_t kSharedLimit = 64 * 1024;
#else
constexpr int64_t kSharedLimit = 227 * 1024;
#endif

// Numbers `column` to `column + 7` of `row` into 16 bytes of shared memory, zeros where !valid or from `limit` on.
// Aligned: row and column are 16-byte aligned and limit is a multiple of 8; `base` is any pointer that may be read.
template <bool Aligned, typename T>
__device__ __forceinline__ void stage8(T* dst, const T* base, const T* row, bool valid, int64_t column, int64_t limit) {
  static_assert(sizeof(T) == 2, "8 numbers in 16 bytes");
  if constexpr (Aligned) {
    valid = valid && column < limit;
    copy16_async(dst, valid ? row + column : base, valid);
  } else {
    __align__(16) T numbers[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      numbers[i] = valid && column + i < limit ? row[column + i] : narrow<T>(0.0f);
    }
    *reinterpret_cast<uint4*>(dst) = *reinterpret_cast<const uint4*>(numbers);
  }
}

// sums[0] (feature g), sums[1] (feature g + 8) += squares of W + s d, over the 16 walked columns of both results.
template <typename T>
__device__ __forceinline__ void add_squares(float (&sums)[2], const uint32_t (&w)[4], const float (&left)[4],
                                            const float (&right)[4], float scaling) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 wl = unpack<T>(w[half]), wr = unpack<T>(w[2 + half]);
    const float l0 = fmaf(scaling, left[2 * half], wl.x), l1 = fmaf(scaling, left[2 * half + 1], wl.y);
    const float r0 = fmaf(scaling, right[2 * half], wr.x), r1 = fmaf(scaling, right[2 * half + 1], wr.y);
    sums[half] = fmaf(l0, l0, fmaf(l1, l1, fmaf(r0, r0, fmaf(r1, r1, sums[half]))));
  }
}

// Adds the sums of a block of WM x WN warps, each with 64 features in fragment layout, in fixed order, and writes the
// block's partials. `scratch` holds WN * WM * 64 floats; no copy into it may be in flight.
template <int WM, int WN, typename T>
__device__ __forceinline__ void write_partials(const NormProblem<T>& p, float (&sums)[4][2], float* scratch,
                                               int64_t feature0) {
  constexpr int kFeatures = 64 * WM;
  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % WM, warp_n = threadIdx.x / 32 / WM;
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sums[m][half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) scratch[warp_n * kFeatures + warp_m * 64 + m * 16 + half * 8 + lane / 4] = sum;
    }
  }
  __syncthreads();
  for (int f = threadIdx.x; f < kFeatures && feature0 + f < p.out; f += blockDim.x) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < WN; ++n) sum += scratch[n * kFeatures + f];
    p.partials[blockIdx.y * p.out + feature0 + f] = sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// How the walked dimension is split

struct Splits {
  int64_t tiles;  // walked tiles per split; the last split may have fewer
  int count;
};

// `slots` blocks run at once. Every block also pays about two tiles of work to start up and finish. No split has more
// than most_tiles.
inline Splits split_walk(int64_t owned_tiles, int64_t walked_tiles, int64_t slots, int64_t most_tiles) {
  Splits best{0, 0};
  if (owned_tiles == 0 || walked_tiles == 0) return best;
  int64_t best_cost = INT64_MAX;
  const int64_t least = (walked_tiles + most_tiles - 1) / most_tiles;
  const int64_t most = std::max(least, std::min(walked_tiles, (2 * slots + owned_tiles - 1) / owned_tiles));
  for (int64_t count = least; count <= most; ++count) {
    const int64_t tiles = (walked_tiles + count - 1) / count;
    const int64_t waves = (owned_tiles * count + slots - 1) / slots;
    if (waves * (tiles + 2) < best_cost) {
      best_cost = waves * (tiles + 2);
      best = {tiles, static_cast<int>((walked_tiles + tiles - 1) / tiles)};
    }
  }
  return best;
}

// ---------------------------------------------------------------------------------------------------------------------
// Finish

// norm (out,), gain (out,); cached (out,) is read when the fingerprint says that it holds, else written.
template <typename Acc>
__global__ void norm_finish_kernel(const Acc* partials, int splits, int64_t out, FeatureVector magnitude,
                                   const int64_t* fingerprint, Acc* cached, Acc* norm, Acc* gain) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  wait_for_previous_launch();
  if (i >= out) return;
  const Acc m = magnitude.at<Acc>(i);  // beside the partials, not after them
  Acc n;
  if (is_stale(fingerprint)) {
    Acc sum = 0;
#pragma unroll 8  // as many are waited for at once
    for (int split = 0; split < splits; ++split) sum += partials[split * out + i];
    n = sqrt(sum);
    if (cached != nullptr) cached[i] = n;
  } else {
    n = cached[i];
  }
  norm[i] = n;
  gain[i] = n > 0 ? m / n : Acc(0);
}

template <typename Acc>
void launch_norm_finish(const Acc* partials, int splits, int64_t out, FeatureVector magnitude,
                        const int64_t* fingerprint, Acc* cached, Acc* norm, Acc* gain, cudaStream_t stream) {
  constexpr int kThreads = 128;
  launch_beside(norm_finish_kernel<Acc>, static_cast<unsigned>((out + kThreads - 1) / kThreads), kThreads, 0, stream,
                partials, splits, out, magnitude, fingerprint, cached, norm, gain);
}

}  // namespace dora_ext
