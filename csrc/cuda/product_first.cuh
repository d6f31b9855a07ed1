// What a forward's product of product_kernel.cuh can make first of what its own result is made with, y = g ([x | h]
// [W | B]^T) + b: h = x A^T, and the norms of W + s B A with the gain g = m / n.
//
// By themselves those are passes over x and over W at the memory's speed, in which the tensor cores have little to do.
// But the last round of tiles seldom fills the GPU: as many clusters as stay idle then can spend a tile's time on them,
// and nobody asks for them before the first tiles end. So the first numbers that clusters take are those of clusters
// that make such things, and the tiles' come after them. The work is cut into units, of which each of these clusters
// takes every p.first-th: 256 rows of h, or the norms of 256 features (product_norms.cuh). They go through the same
// stages as a tile. A tile's tail waits for the units with its rows and its columns. h that fits nowhere here is
// made by a launch of the same kernel without tiles.
#pragma once

#include "dtype.cuh"
#include "product_tiles.cuh"

namespace dora_ext {

struct NothingFirst {
  static constexpr bool kAny = false, kGainMade = false, kFactors = true;
};

// Zeros that are left as zeros: how many clusters are done, and how often a warpgroup has made its 64 rows of a unit:
// in all, and of each, first those of norms, then those of h. No two products at once may share them.
struct FirstCounters {
  static constexpr int kUnits = 256;
  unsigned done, all_made, made[kUnits];
};
constexpr unsigned kWarpgroupsOfUnit = 4;  // two in each block of the pair

// What norms need beside W, A and B. norm, gain: (out,). Null fingerprint: there is no cache.
struct NormsFirst {
  int units;  // one for each column of tiles, or none: the gain is given
  FeatureVector magnitude;
  const int64_t* fingerprint;
  float *cached, *norm, *gain;
};

// kRanks: 16, 32 or 64, no less than the rank.
template <typename T, int kRanks_>
struct HiddenFirst {
  static constexpr bool kAny = true, kGainMade = true, kFactors = true;
  static constexpr int kRanks = kRanks_;

  CUtensorMap lora_A;  // boxes of 64 x kRanks
  T *h, *scaled_h;     // (rows, rank): x A^T, and s times that; null: not asked for
  FirstCounters* counters;
  float scaling;
  int rank;          // a multiple of 8
  int units, early;  // of h: one for each row of tiles, or none: h is given; and those that come before the norms
  NormsFirst norms;
};

// How many steps of 64 k a stage holds of 128 rows of an operand and of A.
template <typename Tile, int kRanks>
constexpr int kStepsOfStage = Tile::kStageBytes >= 2 * (Tile::kLeftBytes + kRanks * 128) ? 2 : 1;

// Number `index` of all units: first h of the rows that the first tiles have, then the norms, then the rest of h.
struct Unit {
  bool of_norms;
  int at;  // row or column of tiles
};
template <typename T, int kRanks>
__device__ __forceinline__ Unit unit_of(const HiddenFirst<T, kRanks>& f, int index) {
  if (index < f.early) return {false, index};
  if (index < f.early + f.norms.units) return {true, index - f.early};
  return {false, index - f.norms.units};
}

// The thread that fetches: until what the tile's tail and its epilogue read is there. The others learn it from the
// tail's stage. Says whether all of all tiles is there: whoever asks again empties the L1 cache, where factors are.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ bool await_stretch(const HiddenFirst<T, kRanks>& f, const TileWalk<Tile>& tile) {
  const unsigned all = (f.units + f.norms.units) * kWarpgroupsOfUnit;
  const bool ready = words_given(&f.counters->all_made) == all;
  const auto await = [&](int unit) {
    while (!ready && words_given(&f.counters->made[unit]) < kWarpgroupsOfUnit) __nanosleep(64);
  };
  if (f.units > 0) await(f.norms.units + tile.row / (Tile::kRows * Tile::kCluster));
  if (f.norms.units > 0) await(tile.column / (Tile::kRows * Tile::kCluster));
  words_before_results();
  return ready;
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

// Its 64 rows of a unit are made. Whoever calls it is a whole warpgroup.
__device__ __forceinline__ void give_word_of_unit(FirstCounters* counters, int unit, int warpgroup) {
  results_before_word();
  warpgroup_sync(1 + warpgroup);
  if (threadIdx.x % 128 != 0) return;
  give_word(&counters->made[unit]);
  give_word(&counters->all_made);
}

// The thread that fetches: the stages of 128 rows, from `row` on, of an operand beside those of A.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void fetch_beside_A(const HiddenFirst<T, kRanks>& f, const CUtensorMap* rows, int row,
                                               int inner, RingPlace<Tile::kStages>& place, uint32_t shared,
                                               uint32_t loaded, uint32_t freed) {
  constexpr int kSteps = kStepsOfStage<Tile, kRanks>;
  for (int k = 0; k < inner; k += kSteps * Tile::kInner) {
    const uint32_t stage = shared + place.stage * Tile::kStageBytes, barrier = loaded + place.stage * 8;
    barrier_wait(freed + place.stage * 8, place.parity ^ 1);
    barrier_arrive_expecting(barrier, kSteps * (Tile::kLeftBytes + kRanks * 128));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      load_box(stage + step * Tile::kLeftBytes, rows, k + step * Tile::kInner, row, barrier);
      load_box(stage + kSteps * Tile::kLeftBytes + step * kRanks * 128, &f.lora_A, k + step * Tile::kInner, 0, barrier);
    }
    place.advance();
  }
}

// A warpgroup that multiplies: 64 of the 128 rows of h that a block has of a unit. Its sums are some of a tile's: both
// would not fit.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void make_hidden(const HiddenFirst<T, kRanks>& f, int unit, const ProductProblem& p,
                                            RingPlace<Tile::kStages>& place, uint32_t shared, uint32_t loaded,
                                            uint32_t freed, int warpgroup, float (&tile_sums)[Tile::kColumns / 2]) {
  constexpr int kSteps = kStepsOfStage<Tile, kRanks>;
  const int lane = thread_here() % 32;
  auto& sums = reinterpret_cast<float (&)[kRanks / 2]>(tile_sums);
  int accumulate = 0, unfinished = -1;
  const auto free_stage = [&](int stage) {
    if (stage >= 0 && lane < Tile::kCluster) barrier_arrive_at(freed + stage * 8, lane);
  };
#pragma unroll 1
  for (int k = 0; k < p.inner; k += kSteps * Tile::kInner) {
    const uint32_t stage = shared + place.stage * Tile::kStageBytes;
    const uint64_t left = describe_inner_contiguous(stage + warpgroup * 64 * Tile::kInner * 2);
    const uint64_t right = describe_inner_contiguous(stage + kSteps * Tile::kLeftBytes);
    barrier_wait(loaded + place.stage * 8, place.parity);
    products_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int at = 0; at < Tile::kInner / 16; ++at) {
        multiply_k16<T, false>(sums, left + (step * Tile::kLeftBytes + at * 32 >> 4),
                               right + (step * kRanks * 128 + at * 32 >> 4), accumulate);
        accumulate = 1;
      }
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
  wait_for_previous_launch();  // which may still read what lay where h will lie
  const int row = (unit * Tile::kCluster + static_cast<int>(cluster_rank())) * Tile::kRows + warpgroup * 64;
  store_hidden(f, sums, p.rows, row);
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
