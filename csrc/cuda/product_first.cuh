// What a product of product_kernel.cuh can make first: h = x A^T, which its own tail is, y = g ([x | h] [W | B]^T) + b.
//
// By itself that is a pass over x at the memory's speed, in which the tensor cores have nothing to do. But the last
// round of tiles seldom fills the GPU: as many clusters as stay idle then can spend a tile's time on h, and nobody asks
// for it before the first tiles end. So the first numbers that clusters take are those of stretches of h, and the
// tiles' come after them. A stretch is some rows of tiles, of 256 rows; it goes through the same stages as a tile, with
// A in the place of `right`. A tile's tail waits for the stretch with its rows.
#pragma once

#include "product_tiles.cuh"

namespace dora_ext {

struct NothingFirst {
  static constexpr bool kAny = false;
};

// Zeros that are left as zeros: how many clusters are done, and how often a warpgroup has made 64 rows of a stretch. No
// two products at once may share them.
struct FirstCounters {
  static constexpr int kStretches = 128;
  unsigned done, made[kStretches];
};

// kRanks: 16, 32 or 64, no less than the rank.
template <typename T, int kRanks_>
struct HiddenFirst {
  static constexpr bool kAny = true;
  static constexpr int kRanks = kRanks_;

  CUtensorMap lora_A;  // boxes of 64 x kRanks
  T *h, *scaled_h;     // (rows, rank): x A^T, and s times that; null: not asked for
  FirstCounters* counters;
  float scaling;
  int rank, stretch;  // a multiple of 8; rows of tiles in a stretch
};

// The rows of tiles from `first` to `last` of a stretch.
struct Stretch {
  int first, last;
};
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ Stretch stretch_of(const HiddenFirst<T, kRanks>& f, const TileWalk<Tile>& tile, int number) {
  return {number * f.stretch, min((number + 1) * f.stretch, tile.rows_of_tiles)};
}

// The thread that fetches: until the rows of the tile's tail are there.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void await_stretch(const HiddenFirst<T, kRanks>& f, const TileWalk<Tile>& tile) {
  const int number = tile.row / (Tile::kRows * Tile::kCluster) / f.stretch;
  const Stretch rows = stretch_of(f, tile, number);
  const auto all = static_cast<unsigned>((rows.last - rows.first) * Tile::kCluster * Tile::kRows / 64);
  while (words_given(&f.counters->made[number]) < all) __nanosleep(64);
  words_before_results();
}

// A warpgroup: 64 rows of h, from fp32 sums.
template <typename T, int kRanks>
__device__ __forceinline__ void store_hidden(const HiddenFirst<T, kRanks>& f, const float (&sums)[kRanks / 2], int rows,
                                             int first_row) {
  const int thread = thread_here(), lane = thread % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + thread % 128 / 32 * 16 + half * 8 + lane / 4;
#pragma unroll
    for (int j = 0; j < kRanks / 8; ++j) {
      const int k = j * 8 + lane % 4 * 2;
      if (row >= rows || k >= f.rank) continue;
      const int64_t at = int64_t{row} * f.rank + k;
      const float low = sums[j * 4 + half * 2], high = sums[j * 4 + half * 2 + 1];
      *reinterpret_cast<uint32_t*>(f.h + at) = pack<T>(low, high);
      if (f.scaled_h != nullptr) {
        *reinterpret_cast<uint32_t*>(f.scaled_h + at) = pack<T>(f.scaling * low, f.scaling * high);
      }
    }
  }
}

// The thread that fetches: the stages of a stretch.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void fetch_stretch(const HiddenFirst<T, kRanks>& f, const TileWalk<Tile>& tile,
                                              const ProductMaps& maps, const ProductProblem& p,
                                              RingPlace<Tile::kStages>& place, uint32_t shared, uint32_t loaded,
                                              uint32_t freed) {
  const Stretch rows = stretch_of(f, tile, tile.stretch);
#pragma unroll 1
  for (int i = rows.first; i < rows.last; ++i) {
    const int row = (i * Tile::kCluster + static_cast<int>(cluster_rank())) * Tile::kRows;
    for (int k = 0; k < p.inner; k += Tile::kInner) {
      const uint32_t stage = shared + place.stage * Tile::kStageBytes, barrier = loaded + place.stage * 8;
      barrier_wait(freed + place.stage * 8, place.parity ^ 1);
      barrier_arrive_expecting(barrier, Tile::kLeftBytes + kRanks * 128);
      load_box(stage, &maps.left, k, row, barrier);
      load_box(stage + Tile::kLeftBytes, &f.lora_A, k, 0, barrier);
      place.advance();
    }
  }
}

// A warpgroup that multiplies: 64 of every 128 rows of a stretch. Its sums are some of a tile's: both would not fit.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void make_stretch(const HiddenFirst<T, kRanks>& f, const TileWalk<Tile>& tile,
                                             const ProductProblem& p, RingPlace<Tile::kStages>& place, uint32_t shared,
                                             uint32_t loaded, uint32_t freed, int warpgroup,
                                             float (&tile_sums)[Tile::kColumns / 2]) {
  const int lane = thread_here() % 32;
  const Stretch rows = stretch_of(f, tile, tile.stretch);
#pragma unroll 1
  for (int i = rows.first; i < rows.last; ++i) {
    auto& sums = reinterpret_cast<float (&)[kRanks / 2]>(tile_sums);
    int accumulate = 0, unfinished = -1;
    const auto free_stage = [&](int stage) {
      if (stage >= 0 && lane < Tile::kCluster) barrier_arrive_at(freed + stage * 8, lane);
    };
#pragma unroll 1
    for (int k = 0; k < p.inner; k += Tile::kInner) {
      const uint32_t stage = shared + place.stage * Tile::kStageBytes;
      const uint64_t left = describe_inner_contiguous(stage + warpgroup * 64 * Tile::kInner * 2);
      const uint64_t right = describe_inner_contiguous(stage + Tile::kLeftBytes);
      barrier_wait(loaded + place.stage * 8, place.parity);
      products_begin();
#pragma unroll
      for (int step = 0; step < Tile::kInner / 16; ++step) {
        multiply_k16<T, false>(sums, left + step * (32 >> 4), right + step * (32 >> 4), accumulate);
        accumulate = 1;
      }
      products_commit();
      products_wait<1>();
      free_stage(unfinished);
      unfinished = place.stage;
      place.advance();
    }
    products_wait<0>();
    sums_are_ready(sums);
    free_stage(unfinished);
    const int row = (i * Tile::kCluster + static_cast<int>(cluster_rank())) * Tile::kRows + warpgroup * 64;
    store_hidden(f, sums, p.rows, row);
    results_before_word();
    warpgroup_sync(1 + warpgroup);
    if (threadIdx.x % 128 == 0) give_word(&f.counters->made[tile.stretch]);
  }
}

// One warp of a cluster that is done with everything.
template <typename T, int kRanks>
__device__ __forceinline__ void leave_stretches(const HiddenFirst<T, kRanks>& f, unsigned clusters) {
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&f.counters->done, 1) + 1 == clusters;
  }
  if (!__any_sync(~0u, last)) return;
  auto* all = reinterpret_cast<unsigned*>(f.counters);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(FirstCounters) / 4); i += 32) all[i] = 0;
}

}  // namespace dora_ext
