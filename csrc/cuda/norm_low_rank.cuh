// The norm of fp16 and bf16 weights for ranks up to 64: the tiles of low_rank.cuh, squared and added up.
#pragma once

#include "low_rank.cuh"

namespace dora_ext {

template <typename T>
struct SquareSink {
  float sums[4][2] = {};

  __device__ __forceinline__ void take(int m, int64_t, const uint32_t (&w)[4], const float (&left)[4],
                                       const float (&right)[4], float scaling) {
    add_squares<T>(sums[m], w, left, right, scaling);
  }
};

template <int KT, int WM, int WN, bool Transposed>
using LowRankTile = LowRankShape<KT, WM, WN, 1, DenseSource<__half, Transposed>>;  // of any 16-bit numbers

template <typename T, int KT, int WM, int WN, bool Transposed>
__global__ void __launch_bounds__(32 * WM * WN, 2) norm_low_rank_kernel(NormProblem<T> p, int64_t tiles_per_split) {
  using Tile = LowRankTile<KT, WM, WN, Transposed>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  if (Tile::kSharedBytes > kSharedLimit || !is_stale(p.fingerprint)) return;
  DenseSource<T, Transposed> source{p};
  SquareSink<T> sink;
  walk_low_rank<Tile>(p, tiles_per_split, shared_bytes, source, sink);
  write_partials<WM, WN>(p, sink.sums, reinterpret_cast<float*>(shared_bytes),
                         static_cast<int64_t>(blockIdx.x) * Tile::kFeatures);
}

}  // namespace dora_ext
