// V = g * (W + s B A), rounded once: the tiles of low_rank.cuh, scaled and stored. Bound by reading W and writing V.
#pragma once

#include "low_rank_nf4.cuh"

namespace dora_ext {

// An 8x8 tile of 16-bit numbers across the warp, turned around: lane l holds row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ uint32_t turn_8x8(uint32_t v) {
  uint32_t turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(v));
  return turned;
}

// One step of turning 4x4 words around in four lanes: a pair of words changes places with the lane at distance `mask`.
__device__ __forceinline__ void exchange(uint32_t& a, uint32_t& b, int mask) {
  const bool upper = threadIdx.x & mask;
  const uint32_t other = __shfl_xor_sync(~0u, upper ? a : b, mask);
  (upper ? a : b) = other;
}

template <typename T, bool Transposed>
struct StoreSink {
  const NormProblem<T>& p;
  T* out;
  int64_t feature0;  // of the warp's 64
  float gain[4][2];  // of features g and g + 8 of every 16

  __device__ __forceinline__ StoreSink(const NormProblem<T>& problem, const FeatureVector& gains, T* v, int64_t feature)
      : p(problem), out(v), feature0(feature) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t f = feature0 + i * 8 + threadIdx.x % 32 / 4;
      gain[i / 2][i % 2] = f < p.out ? gains.at<float>(f) : 0.f;
    }
  }

  // Four 8x8 tiles lie across the warp, a word of each in every lane. Lane t of four gathers its row of tile t: 16
  // bytes in a row of V.
  __device__ __forceinline__ void take(int m, int64_t column, const uint32_t (&w)[4], const float (&left)[4],
                                       const float (&right)[4], float scaling) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i % 2;
      const float2 weight = unpack<T>(w[i]);
      const float d0 = i < 2 ? left[2 * half] : right[2 * half], d1 = i < 2 ? left[2 * half + 1] : right[2 * half + 1];
      v[i] = pack<T>(gain[m][half] * fmaf(scaling, d0, weight.x), gain[m][half] * fmaf(scaling, d1, weight.y));
      if constexpr (Transposed) v[i] = turn_8x8(v[i]);
    }
    exchange(v[0], v[1], 1);
    exchange(v[2], v[3], 1);
    exchange(v[0], v[2], 2);
    exchange(v[1], v[3], 2);

    const int tile = threadIdx.x % 4, row_of_tile = threadIdx.x % 32 / 4;
    const int64_t feature = feature0 + m * 16 + tile % 2 * 8 + (Transposed ? 0 : row_of_tile);
    const int64_t walked = column + tile / 2 * 8 + (Transposed ? row_of_tile : 0);
    if (feature >= p.out || walked >= p.in) return;
    T* to = out + (Transposed ? walked * p.out + feature : feature * p.in + walked);
    *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
  }
};

template <typename T, int KT, int WM, int WN, bool Transposed>
using ScaledTile = LowRankShape<KT, WM, WN, 1, DenseSource<T, Transposed>>;

template <typename T, int KT, int WM, int WN, bool Transposed>
__global__ void __launch_bounds__(32 * WM * WN, 2)
    scaled_weight_kernel(NormProblem<T> p, FeatureVector gain, T* out, int64_t tiles_per_split) {
  using Tile = ScaledTile<T, KT, WM, WN, Transposed>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  if (Tile::kSharedBytes > kSharedLimit) return;
  DenseSource<T, Transposed> source{p};
  const int64_t feature0 = static_cast<int64_t>(blockIdx.x) * Tile::kFeatures + threadIdx.x / 32 % WM * 64;
  StoreSink<T, Transposed> sink(p, gain, out, feature0);
  walk_low_rank<Tile>(p, tiles_per_split, shared_bytes, source, sink);
}

template <typename T, int KT, int WM, int WN>
using ScaledNf4Tile = LowRankShape<KT, WM, WN, 2, Nf4Source<T>>;

template <typename T, int KT, int WM, int WN>
__global__ void __launch_bounds__(32 * WM * WN, 2)
    scaled_weight_nf4_kernel(NormProblem<T> p, Nf4Matrix matrix, FeatureVector gain, T* out, int64_t tiles_per_split) {
  using Tile = ScaledNf4Tile<T, KT, WM, WN>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  if (Tile::kSharedBytes > kSharedLimit) return;
  Nf4Source<T> source{p, matrix};
  const int64_t feature0 = static_cast<int64_t>(blockIdx.x) * Tile::kFeatures + threadIdx.x / 32 % WM * 64;
  StoreSink<T, false> sink(p, gain, out, feature0);
  walk_low_rank<Tile>(p, tiles_per_split, shared_bytes, source, sink);
}

// Whether there is a kernel for it; then it is launched. Rows of W, V and A start on 16 bytes.
template <bool Transposed, typename T>
bool launch_scaled_weight(const NormProblem<T>& p, FeatureVector gain, T* out, int multiprocessors,
                          int64_t shared_limit, cudaStream_t stream) {
  LowRankPlan<void(NormProblem<T>, FeatureVector, T*, int64_t)> plan;
  const auto plan_tile = [&](auto tile, auto* kernel) {
    return plan_low_rank_tile<decltype(tile)>(plan, kernel, p.rank, p.out, p.in, 2, multiprocessors, shared_limit);
  };
  // Rows of memory of at least 256 bytes a tile: 64 features of 128 columns, or turned around.
  constexpr int kM = Transposed ? 2 : 1, kN = Transposed ? 4 : 8;
  const bool planned =
      plan_tile(ScaledTile<T, 1, kM, kN, Transposed>{}, scaled_weight_kernel<T, 1, kM, kN, Transposed>) ||
      plan_tile(ScaledTile<T, 2, kM, kN, Transposed>{}, scaled_weight_kernel<T, 2, kM, kN, Transposed>) ||
      plan_tile(ScaledTile<T, 4, 2, 4, Transposed>{}, scaled_weight_kernel<T, 4, 2, 4, Transposed>);
  if (planned) plan.launch(stream, p, gain, out);
  return planned;
}

template <typename T>
bool launch_scaled_weight_nf4(const NormProblem<T>& p, const Nf4Matrix& matrix, FeatureVector gain, T* out,
                              int multiprocessors, int64_t shared_limit, cudaStream_t stream) {
  LowRankPlan<void(NormProblem<T>, Nf4Matrix, FeatureVector, T*, int64_t)> plan;
  const auto plan_tile = [&](auto tile, auto* kernel) {
    return plan_low_rank_tile<decltype(tile)>(plan, kernel, p.rank, p.out, p.in, 2, multiprocessors, shared_limit);
  };
  const bool planned = plan_tile(ScaledNf4Tile<T, 1, 1, 8>{}, scaled_weight_nf4_kernel<T, 1, 1, 8>) ||
                       plan_tile(ScaledNf4Tile<T, 2, 1, 8>{}, scaled_weight_nf4_kernel<T, 2, 1, 8>) ||
                       plan_tile(ScaledNf4Tile<T, 4, 2, 4>{}, scaled_weight_nf4_kernel<T, 4, 2, 4>);
  if (planned) plan.launch(stream, p, matrix, gain, out);
  return planned;
}

}  // namespace dora_ext
