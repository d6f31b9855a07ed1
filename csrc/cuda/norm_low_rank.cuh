// The norm of fp16 and bf16 weights for ranks up to 64: bound by reading W, so W streams through shared memory once,
// the block's rows of lora_B stay in registers, and tiles of lora_A come along with W's.
//
//                 in ->        A tile  (16 KT, BN)          BM = 64 WM features, every warp 64 of them
//                                                           BN = 16 WN columns, every warp 16 of them
//   out   B rows (BM, 16 KT)   W tile  (BM, BN)             kStages tiles of W and A in flight or in use
//    |    in registers                                      W tile is (BN, BM) when Transposed
//
// A is read again by every owner of features, from L2: BM is 64 to 128 so that this stays well below W's own bytes.
#pragma once

#include "norm_common.cuh"

namespace dora_ext {

template <int KT, int WM, int WN, bool Transposed>
struct LowRankTile {
  static constexpr int kThreads = 32 * WM * WN;
  static constexpr int kFeatures = 64 * WM;
  static constexpr int kColumns = 16 * WN;
  static constexpr int kRank = 16 * KT;
  static constexpr int kStages = 3;
  // 16 bytes of padding a row keep ldmatrix free of bank conflicts.
  static constexpr int kPitchA = kColumns + 8;
  static constexpr int kPitchB = kRank + 8;
  static constexpr int kPitchW = (Transposed ? kFeatures : kColumns) + 8;
  static constexpr int kUnroll = KT == 4 ? 2 : 4;  // of W's copies: rank 64 has no registers to spare for addresses
  static constexpr int kSizeA = kRank * kPitchA;
  static constexpr int kStage = kSizeA + (Transposed ? kColumns : kFeatures) * kPitchW;
  static constexpr int kSharedBytes = kStages * kStage * 2;
  static_assert(kFeatures * kPitchB <= kStage, "lora_B passes through the last stage");
  static_assert(WN * kFeatures * 4 <= kSharedBytes, "so do the sums");
};

// Queues the copies of one stage: the tiles of A and W at `column`, zeros outside of the matrices.
template <typename T, typename Tile, bool Transposed>
__device__ __forceinline__ void load_low_rank_stage(const NormProblem<T>& p, T* stage, int64_t feature0,
                                                    int64_t column0) {
  constexpr int kChunksA = Tile::kColumns / 8;
  constexpr int kAllA = Tile::kRank * kChunksA, kAllW = Tile::kFeatures * Tile::kColumns / 8;
  static_assert(kAllW % Tile::kThreads == 0, "every thread has the same number of W's copies");
#pragma unroll
  for (int i = 0; i < (kAllA + Tile::kThreads - 1) / Tile::kThreads; ++i) {
    const int c = threadIdx.x + i * Tile::kThreads;
    if (kAllA % Tile::kThreads != 0 && c >= kAllA) break;
    const int k = c / kChunksA, column = c % kChunksA * 8;
    stage8<true>(stage + k * Tile::kPitchA + column, p.lora_A, p.lora_A + k * p.pitch_A, k < p.rank, column0 + column,
                 p.pitch_A);
  }
  T* tile = stage + Tile::kSizeA;
  constexpr int kChunksW = (Transposed ? Tile::kFeatures : Tile::kColumns) / 8;
#pragma unroll Tile::kUnroll
  for (int i = 0; i < kAllW / Tile::kThreads; ++i) {
    const int c = threadIdx.x + i * Tile::kThreads;
    const int row = c / kChunksW, offset = c % kChunksW * 8;
    const int64_t row0 = Transposed ? column0 : feature0, offset0 = Transposed ? feature0 : column0;
    const int64_t rows = Transposed ? p.in : p.out, pitch = Transposed ? p.out : p.in;
    stage8<true>(tile + row * Tile::kPitchW + offset, p.weight, p.weight + (row0 + row) * pitch, row0 + row < rows,
                 offset0 + offset, pitch);
  }
}

template <typename T, int KT, int WM, int WN, bool Transposed>
__global__ void __launch_bounds__(32 * WM * WN, 2) norm_low_rank_kernel(NormProblem<T> p, int64_t tiles_per_split) {
  using Tile = LowRankTile<KT, WM, WN, Transposed>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  T* shared = reinterpret_cast<T*>(shared_bytes);
  if (Tile::kSharedBytes > kSharedLimit || !is_stale(p.fingerprint)) return;

  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % WM, warp_n = threadIdx.x / 32 / WM;
  const int64_t feature0 = static_cast<int64_t>(blockIdx.x) * Tile::kFeatures;
  const int64_t column0 = blockIdx.y * tiles_per_split * Tile::kColumns;
  const int64_t all_tiles = (p.in - column0 + Tile::kColumns - 1) / Tile::kColumns;
  const int tiles = static_cast<int>(all_tiles < tiles_per_split ? all_tiles : tiles_per_split);

  // lora_B's rows pass through the one stage that isn't filled at first, and arrive with the first tile.
  T* b_rows = shared + (Tile::kStages - 1) * Tile::kStage;
  load_lora_B<true>(p, b_rows, Tile::kPitchB, feature0, Tile::kFeatures, 0, Tile::kRank);
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < tiles) {
      load_low_rank_stage<T, Tile, Transposed>(p, shared + s * Tile::kStage, feature0, column0 + s * Tile::kColumns);
    }
    copy_commit();
  }

  copy_wait<Tile::kStages - 2>();
  __syncthreads();
  uint32_t b_fragments[4][KT][4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int k = 0; k < KT; ++k) {
      load_matrix_x4<false>(b_fragments[m][k],
                            b_rows + (warp_m * 64 + m * 16 + lane % 16) * Tile::kPitchB + k * 16 + lane / 16 * 8);
    }
  }

  float sums[4][2] = {};
  int stage = 0;
  for (int i = 0; i < tiles; ++i) {
    copy_wait<Tile::kStages - 2>();
    // All see tile i; and all have left tile i - 1 (at first: lora_B), whose stage is filled next.
    __syncthreads();
    if (i + Tile::kStages - 1 < tiles) {
      const int next = stage == 0 ? Tile::kStages - 1 : stage - 1;
      load_low_rank_stage<T, Tile, Transposed>(p, shared + next * Tile::kStage, feature0,
                                               column0 + static_cast<int64_t>(i + Tile::kStages - 1) * Tile::kColumns);
    }
    copy_commit();

    const T* a_tile = shared + stage * Tile::kStage;
    const T* w_tile = a_tile + Tile::kSizeA;
    uint32_t a_fragments[KT][4];
#pragma unroll
    for (int k = 0; k < KT; ++k) {
      load_matrix_x4<true>(a_fragments[k], a_tile + (k * 16 + lane % 16) * Tile::kPitchA + warp_n * 16 + lane / 16 * 8);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t w[4];
      load_weight_fragment<Transposed>(w, w_tile, Tile::kPitchW, warp_m * 64 + m * 16, warp_n * 16);
      float left[4] = {}, right[4] = {};
#pragma unroll
      for (int k = 0; k < KT; ++k) {
        mma_m16n8k16<T>(left, b_fragments[m][k], {a_fragments[k][0], a_fragments[k][1]});
        mma_m16n8k16<T>(right, b_fragments[m][k], {a_fragments[k][2], a_fragments[k][3]});
      }
      add_squares<T>(sums[m], w, left, right, p.scaling);
    }
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
  copy_wait<0>();
  write_partials<WM, WN>(p, sums, reinterpret_cast<float*>(shared_bytes), feature0);
}

}  // namespace dora_ext
