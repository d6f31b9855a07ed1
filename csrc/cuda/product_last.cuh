// What a product of product_kernel.cuh can make last: dA = P^T x, beside dX = [G | P] [W ; A].
//
// Nobody waits for dA, which by itself is a pass over x at the memory's speed. So the numbers after those of the tiles
// are those of stretches of dA, some columns each: clusters that find no tile left in the last round take them, while
// the others multiply. A stretch goes through the same stages as a tile, 128 tokens of P and x at a time.
#pragma once

#include "product_tiles.cuh"

namespace dora_ext {

// kRanks: 16, 32 or 64, no less than the rank. T: of x and P. P's map is that of left_tail.
template <typename T, int kRanks_>
struct GradientLast {
  static constexpr bool kAny = true, kGainMade = false, kFactors = false;
  static constexpr int kRanks = kRanks_;
  static constexpr int kTokens = 128, kBoxes = 2;  // a stage: as many tokens, of boxes of 64 columns, in each block
  static constexpr int kColumns = 64 * kBoxes;

  CUtensorMap x;  // boxes of 64 x 128
  float* wide;    // (rank, columns of x), or else
  T* narrow;
};

// dA has no reader in this kernel.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ bool await_stretch(const GradientLast<T, kRanks>&, const TileWalk<Tile>&) {
  return true;
}
template <typename T, int kRanks>
__device__ __forceinline__ void leave_stretches(const GradientLast<T, kRanks>&, unsigned) {}

template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ int first_column(const GradientLast<T, kRanks>& f, const TileWalk<Tile>& tile) {
  return (tile.stretch * Tile::kCluster + static_cast<int>(cluster_rank())) * f.kColumns;
}

// The thread that fetches: the stages of a stretch.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void fetch_stretch(const GradientLast<T, kRanks>& f, const TileWalk<Tile>& tile,
                                              const ProductMaps& maps, const ProductProblem& p,
                                              RingPlace<Tile::kStages>& place, uint32_t shared, uint32_t loaded,
                                              uint32_t freed) {
  static_assert(Tile::kRows == f.kTokens && Tile::kStageBytes >= Tile::kLeftBytes * (1 + f.kBoxes),
                "P's boxes, and x's");
  const int column = first_column(f, tile);
  wait_for_previous_launch();
  for (int token = 0; token < p.rows; token += f.kTokens) {
    const uint32_t stage = shared + place.stage * Tile::kStageBytes, barrier = loaded + place.stage * 8;
    barrier_wait(freed + place.stage * 8, place.parity ^ 1);
    barrier_arrive_expecting(barrier, Tile::kLeftBytes * (1 + f.kBoxes));
    load_box(stage, &maps.left_tail, 0, token, barrier);
#pragma unroll
    for (int box = 0; box < f.kBoxes; ++box) {
      load_box(stage + (1 + box) * Tile::kLeftBytes, &f.x, column + box * 64, token, barrier);
    }
    place.advance();
  }
}

// A warpgroup that multiplies: each of its warps has 16 columns of the block's, and all ranks.
template <typename Tile, typename T, int kRanks>
__device__ __forceinline__ void make_stretch(const GradientLast<T, kRanks>& f, const TileWalk<Tile>& tile,
                                             const ProductProblem& p, RingPlace<Tile::kStages>& place, uint32_t shared,
                                             uint32_t loaded, uint32_t freed, int warpgroup,
                                             float (&)[Tile::kColumns / 2]) {
  static_assert(f.kColumns == 8 * 16, "of eight warps");
  constexpr int kM = kRanks / 16;
  const int thread = thread_here(), lane = thread % 32, warp = thread / 32;
  // Of boxes swizzled by 128 bytes: 16 bytes at (token, 8 c) lie at c ^ token % 8 of the token's 128 bytes. Fragments
  // of P^T have their tokens in lanes 0-7 and 16-23, and 8 ranks on in lanes 8-15; those of x in lanes 0-15.
  const int p_token = lane / 16 * 8 + lane % 8, p_eight = lane / 8 % 2, x_token = lane % 16;
  const uint32_t p_at = p_token * 128, x_at = Tile::kLeftBytes * (1 + warp / 4) + x_token * 128 +
                                              ((warp % 4 * 2 + lane / 16) ^ (x_token % 8)) * 16;
  float sums[kM][2][4] = {};
#pragma unroll 1
  for (int token = 0; token < p.rows; token += f.kTokens) {
    const uint32_t stage = shared + place.stage * Tile::kStageBytes;
    // Tensor cores cut off what does not fit into a sum of fp32: over many tokens that would add up.
    float part[kM][2][4] = {};
    barrier_wait(loaded + place.stage * 8, place.parity);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Of 64 tokens at once: what is loaded takes time to come.
      const uint32_t from = stage + half * 64 * 128;
      uint32_t b[4][4];
#pragma unroll
      for (int at = 0; at < 4; ++at) load_matrix_x4_at<true>(b[at], from + x_at + at * 16 * 128);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t a[4][4];
#pragma unroll
        for (int at = 0; at < 4; ++at) {
          load_matrix_x4_at<true>(a[at], from + p_at + at * 16 * 128 + ((m * 2 + p_eight) ^ (p_token % 8)) * 16);
        }
#pragma unroll
        for (int at = 0; at < 4; ++at) {
          mma_m16n8k16<T>(part[m][0], a[at], {b[at][0], b[at][1]});
          mma_m16n8k16<T>(part[m][1], a[at], {b[at][2], b[at][3]});
        }
      }
    }
    __syncwarp();
    if (lane < Tile::kCluster) barrier_arrive_at(freed + place.stage * 8, lane);
    place.advance();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[m][i / 4][i % 4] += part[m][i / 4][i % 4];
    }
  }
  const int column = first_column(f, tile) + warp * 16 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i / 2, half = i % 2, rank = m * 16 + half * 8 + lane / 4;
      if (rank >= p.tail || column + n * 8 >= p.columns) continue;
      const int64_t at = int64_t{rank} * p.columns + column + n * 8;
      const float low = sums[m][n][half * 2], high = sums[m][n][half * 2 + 1];
      if (f.wide != nullptr) {
        *reinterpret_cast<float2*>(f.wide + at) = make_float2(low, high);
      } else {
        *reinterpret_cast<uint32_t*>(f.narrow + at) = pack<T>(low, high);
      }
    }
  }
}

}  // namespace dora_ext
