// compose with the features last, fp16 and bf16, ranks above 96: tiles of h B^T (product_walk.cuh: left = h, right =
// lora_B, dealt) that meet base in registers. Bound by the tensor cores rather than by memory. On an H100,
// 4096 x 4096: rank 96 37.0 us, in compose_mma.cuh 35.9; rank 128 36.3 and 39.5.
//
// Base's part of a tile passes through shared memory only so that it can be under way while the products are formed:
// every thread fetches the 16 bytes that it will use itself, and no other thread sees them.
#pragma once

#include "compose_common.cuh"
#include "launches.cuh"
#include "product_walk.cuh"

namespace dora_ext {

template <typename T, typename Tile>
struct HighRankCompose {
  static constexpr bool kRightByRank = false;
  // [feature of the tile], for the tile in work
  using Factors = float (&)[4][Tile::kColumns];

  const ComposeProblem<T>& p;
  const bool aligned_h, aligned_B;
  Factors factors;
  ComposeFactors<float> mine[Tile::kColumns / Tile::kThreads > 0 ? Tile::kColumns / Tile::kThreads : 1] = {};

  __device__ __forceinline__ void load_left(T* dst, int64_t row, int chunk) const {
    load_rank_chunk<Tile::kThreads, Tile::kRows, false>(dst, p.h, row * Tile::kRows, p.tokens, p.rank,
                                                        chunk * Tile::kChunk, false, aligned_h);
  }
  __device__ __forceinline__ void load_right(T* dst, int64_t column, int chunk) const {
    load_rank_chunk<Tile::kThreads, Tile::kColumns, true>(dst, p.lora_B, column * Tile::kColumns, p.out, p.rank,
                                                          chunk * Tile::kChunk, false, aligned_B);
  }

  // A thread has 8 tokens of a tile, 16 m + 8 half, and of each two packs of 8 features: parts 4 m + 2 half + group.
  static_assert(Tile::kColumnFragments == 4, "two groups of 32 features a warp");
  __device__ __forceinline__ int64_t token_of(const TilePlace& place, int part) const {
    const int warp_m = threadIdx.x / 32 % Tile::kWarpsM;
    return place.row * Tile::kRows + warp_m * 64 + part / 2 * 8 + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ int64_t feature_of(const TilePlace& place, int part) const {
    const int warp_n = threadIdx.x / 32 / Tile::kWarpsM;
    return place.column * Tile::kColumns + warp_n * 64 + part % 2 * 32 + threadIdx.x % 4 * 8;
  }

  __device__ __forceinline__ void load_beside(T* dst, const TilePlace& place, int begin, int end) const {
#pragma unroll 1
    for (int part = begin; part < end; ++part) {
      const int64_t token = token_of(place, part), feature = feature_of(place, part);
      const bool valid = token < p.tokens && feature < p.out;
      const int64_t row = !valid || p.rows == nullptr ? token : p.rows[token];
      T* to = dst + (part * Tile::kThreads + threadIdx.x) * 8;
      if (row >= 0) {
        copy16_async(to, p.base + (valid ? row * p.out + feature : 0), valid);
      } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(~0u, ~0u, ~0u, ~0u);  // NaN in both dtypes
      }
    }
  }

  // Fetches the factors in one chunk and writes them down in the next, so that nobody waits for them; the tile before
  // has no more use for its own, and a barrier is still to come before they are read.
  __device__ __forceinline__ void meanwhile(const TilePlace& place, int chunk) {
    if (chunk > 1) return;
#pragma unroll
    for (int i = 0; i < Tile::kColumns / Tile::kThreads; ++i) {
      const int f = threadIdx.x + i * Tile::kThreads;
      if (chunk == 0) {
        mine[i] = compose_factors(p, place.column * Tile::kColumns + f);
      } else {
        factors[0][f] = mine[i].value;
        factors[1][f] = mine[i].product;
        factors[2][f] = mine[i].before;
        factors[3][f] = mine[i].after;
      }
    }
  }

  template <int N>
  __device__ __forceinline__ void finish(const float (&sums)[4][N][4], const T* beside, const TilePlace& place, bool) {
    const int warp_n = threadIdx.x / 32 / Tile::kWarpsM;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      Pack<uint32_t, 4> y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        y[i] = reinterpret_cast<const Pack<uint32_t, 4>*>(beside)[(2 * i + group) * Tile::kThreads + threadIdx.x];
      }
      // Two features at a time, so that few factors take up registers; the results take base's place.
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float2 f[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          f[i] = *reinterpret_cast<const float2*>(&factors[i][warp_n * 64 + group * 32 + threadIdx.x % 4 * 8 + 2 * j]);
        }
        const ComposeFactors<float> left{f[0].x, f[1].x, f[2].x, f[3].x}, right{f[0].y, f[1].y, f[2].y, f[3].y};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float2 v = unpack<T>(y[i].v[j]);
          const float* hB = &sums[i / 2][group * 4 + j][i % 2 * 2];
          y[i].v[j] = pack<T>(left.apply(v.x, hB[0]), right.apply(v.y, hB[1]));
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t token = token_of(place, 2 * i + group), feature = feature_of(place, 2 * i + group);
        if (token < p.tokens && feature < p.out) {
          store(reinterpret_cast<uint32_t*>(p.result + token * p.out + feature), y[i]);
        }
      }
    }
  }
};

// Two blocks on a multiprocessor: one multiplies while the other one stores.
using HighRankComposeTile = WalkTile<2, 2, 4>;

// base and result start on 16 bytes, and out is a multiple of 8.
template <typename T>
__global__ void __launch_bounds__(HighRankComposeTile::kThreads, 2)
    compose_high_rank_kernel(ComposeProblem<T> p, int64_t tiles_per_block) {
  using Tile = HighRankComposeTile;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ __align__(16) float factors[4][Tile::kColumns];
  if (kBeforeAmpere) return;
  const bool ranks_aligned = p.rank % 8 == 0;
  HighRankCompose<T, Tile> job{p, ranks_aligned && reinterpret_cast<uintptr_t>(p.h) % 16 == 0,
                               ranks_aligned && reinterpret_cast<uintptr_t>(p.lora_B) % 16 == 0, factors};
  const int64_t columns = ceil_div<int64_t>(p.out, Tile::kColumns);
  walk_product<T, Tile>(job, reinterpret_cast<T*>(shared_bytes), Tile::chunks(p.rank), columns,
                        ceil_div<int64_t>(p.tokens, Tile::kRows) * columns, tiles_per_block);
}

// False: it does not fit, or has too little to do to fill the device.
template <typename T>
bool launch_compose_high_rank(const ComposeProblem<T>& p, int multiprocessors, int64_t shared_limit,
                              cudaStream_t stream) {
  using Tile = HighRankComposeTile;
  const int64_t factors = sizeof(float) * 4 * Tile::kColumns + 1024;
  int64_t resident = 2;
  WalkMemory memory = walk_memory<Tile>(Tile::chunks(p.rank), shared_limit / 2 - factors);
  if (memory.besides == 0) {
    resident = 1;
    memory = walk_memory<Tile>(Tile::chunks(p.rank), shared_limit - factors);
  }
  const int64_t tiles = ceil_div<int64_t>(p.tokens, Tile::kRows) * ceil_div<int64_t>(p.out, Tile::kColumns);
  if (memory.besides == 0 || tiles * 2 < multiprocessors) return false;
  const int64_t per_block = ceil_div<int64_t>(tiles, multiprocessors * resident);
  const auto kernel = compose_high_rank_kernel<T>;
  allow_shared(kernel, memory.bytes);
  kernel<<<static_cast<unsigned>(ceil_div(tiles, per_block)), Tile::kThreads, memory.bytes, stream>>>(p, per_block);
  return true;
}

}  // namespace dora_ext
