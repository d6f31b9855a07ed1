// The norms of W + s B A that a forward's product makes first (product_first.cuh), and the walk over all that it makes
// first. A warp has 16 features: their rows of B stay in its registers, tiles of B A come from the tensor cores, W is
// added in fp32, and what comes out is squared and summed along k. As the kernels of norm.cuh have it.
#pragma once

#include "norm_common.cuh"
#include "product_first.cuh"

namespace dora_ext {

// Tiles so narrow that a block fetches fewer of W's rows at once than it has warps for make no norms: see
// choose_first.
template <typename Tile>
constexpr bool kMakesNorms = Tile::kPartOfRight == Tile::kRows;

// The thread that fetches: B's rows in a stage of their own, then W's.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void fetch_norms(const HiddenFirst<T, kRanks>& f, int row, const ProductMaps& maps,
                                            const ProductProblem& p, RingPlace<Tile::kStages>& place, uint32_t shared,
                                            uint32_t loaded, uint32_t freed) {
  const uint32_t barrier = loaded + place.stage * 8;
  barrier_wait(freed + place.stage * 8, place.parity ^ 1);
  barrier_arrive_expecting(barrier, Tile::kLeftBytes);
  load_box(shared + place.stage * Tile::kStageBytes, &maps.right_tail, 0, row, barrier);
  place.advance();
  fetch_beside_A<Tile>(f, &maps.right, row, p.inner, place, shared, loaded, freed);
}

// A warpgroup: the sums of squares of features g and g + 8 of each warp's 16, g = lane / 4, in all four lanes.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void sum_squares(const HiddenFirst<T, kRanks>& f, const ProductProblem& p,
                                            RingPlace<Tile::kStages>& place, uint32_t shared, uint32_t loaded,
                                            uint32_t freed, float (&total)[2]) {
  constexpr int kM = kRanks / 16, kSteps = kStepsOfStage<Tile, kRanks>;
  constexpr int kSixteens = Tile::kInner / 16;
  const int thread = thread_here(), lane = thread % 32;
  // Of boxes swizzled by 128 bytes: 16 bytes at (row, 8 c) lie at c ^ row % 8 of the row's 128 bytes.
  const uint32_t line = (thread / 32 * 16 + lane % 16) * 128;
  const auto part = [&](int k16) { return static_cast<uint32_t>(((k16 * 2 + lane / 16) ^ lane % 8) * 16); };
  const auto leave_stage = [&] {
    __syncwarp();
    if (lane < Tile::kCluster) barrier_arrive_at(freed + place.stage * 8, lane);
    place.advance();
  };
  uint32_t b_rows[kM][4];
  barrier_wait(loaded + place.stage * 8, place.parity);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    load_matrix_x4_at(b_rows[m], shared + place.stage * Tile::kStageBytes + line + part(m));
  }
  leave_stage();
#pragma unroll 1
  for (int k = 0; k < p.inner; k += kSteps * Tile::kInner) {
    float sums[2] = {};
    const uint32_t stage = shared + place.stage * Tile::kStageBytes;
    barrier_wait(loaded + place.stage * 8, place.parity);
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      // All of 64 k at once: what is loaded and multiplied takes time to come.
      const uint32_t of_W = stage + step * Tile::kLeftBytes + line;
      const uint32_t of_A = stage + kSteps * Tile::kLeftBytes + step * kRanks * 128 + lane % 16 * 128;
      uint32_t w[kSixteens][4];
      float d[kSixteens][2][4] = {};
#pragma unroll
      for (int at = 0; at < kSixteens; ++at) load_matrix_x4_at(w[at], of_W + part(at));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t a[kSixteens][4];
#pragma unroll
        for (int at = 0; at < kSixteens; ++at) load_matrix_x4_at<true>(a[at], of_A + m * 16 * 128 + part(at));
#pragma unroll
        for (int at = 0; at < kSixteens; ++at) {
          mma_m16n8k16<T>(d[at][0], b_rows[m], {a[at][0], a[at][1]});
          mma_m16n8k16<T>(d[at][1], b_rows[m], {a[at][2], a[at][3]});
        }
      }
#pragma unroll
      for (int at = 0; at < kSixteens; ++at) add_squares<T>(sums, w[at], d[at][0], d[at][1], f.scaling);
    }
    leave_stage();
    total[0] += sums[0];
    total[1] += sums[1];
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(~0u, total[half], 1);
    total[half] += __shfl_xor_sync(~0u, total[half], 2);
  }
}

// A warpgroup: 64 of the 128 features that a block has of a unit.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void make_norms(const HiddenFirst<T, kRanks>& f, int row, const ProductProblem& p,
                                           RingPlace<Tile::kStages>& place, uint32_t shared, uint32_t loaded,
                                           uint32_t freed) {
  wait_for_previous_launch();
  const bool stale = is_stale(f.norms.fingerprint);
  float total[2] = {};
  if (stale) sum_squares<Tile>(f, p, place, shared, loaded, freed, total);
  const int thread = thread_here(), lane = thread % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int feature = row + thread / 32 * 16 + half * 8 + lane / 4;
    if (lane % 4 != 0 || feature >= p.columns) continue;
    const float n = stale ? sqrtf(total[half]) : f.norms.cached[feature];
    f.norms.norm[feature] = n;
    f.norms.gain[feature] = n > 0 ? f.norms.magnitude.template at<float>(feature) / n : 0.0f;
    if (stale && f.norms.cached != nullptr) f.norms.cached[feature] = n;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The units of one of the clusters that make something first.

template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void fetch_stretch(const HiddenFirst<T, kRanks>& f, const TileWalk<Tile>& tile,
                                              const ProductMaps& maps, const ProductProblem& p,
                                              RingPlace<Tile::kStages>& place, uint32_t shared, uint32_t loaded,
                                              uint32_t freed) {
#pragma unroll 1
  for (int index = tile.stretch; index < f.units + f.norms.units; index += p.first) {
    const Unit unit = unit_of(f, index);
    const int row = (unit.at * Tile::kCluster + static_cast<int>(cluster_rank())) * Tile::kRows;
    wait_for_previous_launch();  // which may have made A and B, and says whether the norms are stale
    if (!unit.of_norms) {
      fetch_beside_A<Tile>(f, &maps.left, row, p.inner, place, shared, loaded, freed);
    } else if constexpr (kMakesNorms<Tile>) {
      if (is_stale(f.norms.fingerprint)) fetch_norms<Tile>(f, row, maps, p, place, shared, loaded, freed);
    }
  }
}

template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void make_stretch(const HiddenFirst<T, kRanks>& f, const TileWalk<Tile>& tile,
                                             const ProductProblem& p, RingPlace<Tile::kStages>& place, uint32_t shared,
                                             uint32_t loaded, uint32_t freed, int warpgroup,
                                             float (&tile_sums)[Tile::kColumns / 2]) {
#pragma unroll 1
  for (int index = tile.stretch; index < f.units + f.norms.units; index += p.first) {
    const Unit unit = unit_of(f, index);
    if (!unit.of_norms) {
      make_hidden<Tile>(f, unit.at, p, place, shared, loaded, freed, warpgroup, tile_sums);
    } else if constexpr (kMakesNorms<Tile>) {
      const int row = (unit.at * Tile::kCluster + static_cast<int>(cluster_rank())) * Tile::kRows;
      make_norms<Tile>(f, row, p, place, shared, loaded, freed);
    }
    give_word_of_unit(f.counters, unit.of_norms ? unit.at : f.norms.units + unit.at, warpgroup);
  }
}

}  // namespace dora_ext
