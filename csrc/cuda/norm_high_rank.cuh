// The norm of fp16 and bf16 weights for any rank: a matrix product B A with K = rank in chunks of 32, whose result
// meets W in registers. Bound by the tensor cores and by reading A from L2 rather than by W.
//
//                    in ->         A chunk (32, BN)       BM = 64 WM features, BN = 64 NT columns, 4 WM warps
//                                                         kStages chunks of A (and B) in flight or in use
//   out  B (BM, rank) Resident,    W tile  (BM, BN)       two W tiles: one in use, one filling up piece by piece
//    |   else chunk (BM, 32)                              while the chunks of the tile before are computed
//
// Resident: lora_B's rows lie in shared memory from the start, which halves the traffic from L2.
// not Aligned: rows that don't start on 16 bytes are fetched number by number.
#pragma once

#include "norm_common.cuh"

namespace dora_ext {

template <int WM, int NT, bool Resident>
struct HighRankTile {
  static constexpr int kWarpsN = 4;
  static constexpr int kThreads = 32 * WM * kWarpsN;
  static constexpr int kFeatures = 64 * WM;
  static constexpr int kColumns = 16 * NT * kWarpsN;
  static constexpr int kChunk = 32;
  static constexpr int kStages = 4;
  static_assert(kFeatures == kColumns, "a transposed W tile takes the same room");
  static constexpr int kPitch = kColumns + 8;     // A chunks and W tiles; the padding avoids bank conflicts
  static constexpr int kPitchChunk = kChunk + 8;  // B chunks
  static constexpr int kSizeW = kFeatures * kPitch;
  static constexpr int kSizeA = kChunk * kPitch;
  static constexpr int kStage = kSizeA + (Resident ? 0 : kFeatures * kPitchChunk);
  static constexpr int64_t kLeastBytes = 2 * (2 * kSizeW + kStages * kStage);

  // A piece of W is asked for while a chunk is computed and has arrived kStages - 1 chunks later at the latest, so a
  // tile has at least that many chunks (of zeros, when the rank is small).
  __host__ __device__ static int chunks(int rank) {
    const int needed = (rank + kChunk - 1) / kChunk;
    return needed < kStages - 1 ? kStages - 1 : needed;
  }
  __host__ __device__ static int resident_pitch(int rank) { return chunks(rank) * kChunk + 8; }
  static int64_t shared_bytes(int rank) {
    return kLeastBytes + (Resident ? 2 * int64_t{kFeatures} * resident_pitch(rank) : 0);
  }
};

// Queues piece `piece` of `pieces` of the W tile at (feature0, column0).
template <typename T, typename Tile, bool Aligned, bool Transposed>
__device__ __forceinline__ void load_weight_piece(const NormProblem<T>& p, T* tile, int64_t feature0, int64_t column0,
                                                  int piece, int pieces) {
  constexpr int kWidth = Tile::kColumns / 8, kAll = Tile::kFeatures * kWidth;
  const int per_piece = (kAll + pieces - 1) / pieces;
  const int end = min(kAll, (piece + 1) * per_piece);
  const int64_t row0 = Transposed ? column0 : feature0, offset0 = Transposed ? feature0 : column0;
  const int64_t rows = Transposed ? p.in : p.out, pitch = Transposed ? p.out : p.in;
#pragma unroll 1
  for (int c = piece * per_piece + threadIdx.x; c < end; c += Tile::kThreads) {
    const int row = c / kWidth, offset = c % kWidth * 8;
    stage8<Aligned>(tile + row * Tile::kPitch + offset, p.weight, p.weight + (row0 + row) * pitch, row0 + row < rows,
                    offset0 + offset, pitch);
  }
}

// Queues chunk `chunk` of the tile at column0.
template <typename T, typename Tile, bool Resident, bool Aligned>
__device__ __forceinline__ void load_chunk(const NormProblem<T>& p, T* stage, int64_t feature0, int64_t column0,
                                           int chunk) {
  constexpr int kWidth = Tile::kColumns / 8;
  static_assert(Tile::kChunk * kWidth % Tile::kThreads == 0, "every thread has the same number of copies");
#pragma unroll
  for (int i = 0; i < Tile::kChunk * kWidth / Tile::kThreads; ++i) {
    const int c = threadIdx.x + i * Tile::kThreads;
    const int k = c / kWidth, column = c % kWidth * 8, rank = chunk * Tile::kChunk + k;
    stage8<Aligned>(stage + k * Tile::kPitch + column, p.lora_A, p.lora_A + rank * p.pitch_A, rank < p.rank,
                    column0 + column, p.pitch_A);
  }
  if constexpr (!Resident) {
    load_lora_B<Aligned>(p, stage + Tile::kSizeA, Tile::kPitchChunk, feature0, Tile::kFeatures, chunk * Tile::kChunk,
                         Tile::kChunk);
  }
}

template <typename T, int WM, int NT, bool Resident, bool Aligned, bool Transposed>
__global__ void __launch_bounds__(128 * WM, WM == 1 ? 4 : 1)
    norm_high_rank_kernel(NormProblem<T> p, int64_t tiles_per_split) {
  using Tile = HighRankTile<WM, NT, Resident>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  T* w_tiles = reinterpret_cast<T*>(shared_bytes);
  T* stages = w_tiles + 2 * Tile::kSizeW;
  T* b_rows = stages + Tile::kStages * Tile::kStage;  // Resident only
  if (Tile::kLeastBytes > kSharedLimit || !is_stale(p.fingerprint)) return;

  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % WM, warp_n = threadIdx.x / 32 / WM;
  const int64_t feature0 = static_cast<int64_t>(blockIdx.x) * Tile::kFeatures;
  const int64_t column0 = blockIdx.y * tiles_per_split * Tile::kColumns;
  const int64_t all_tiles = (p.in - column0 + Tile::kColumns - 1) / Tile::kColumns;
  const int tiles = static_cast<int>(all_tiles < tiles_per_split ? all_tiles : tiles_per_split);
  const int chunks = Tile::chunks(p.rank), resident_pitch = Tile::resident_pitch(p.rank);

  // What the loads run ahead to: chunk `ahead_chunk` of tile `ahead_tile`, into stage `ahead_stage`.
  int ahead_tile = 0, ahead_chunk = 0, ahead_stage = 0;
  const auto load_ahead = [&] {
    if (ahead_tile < tiles) {
      load_chunk<T, Tile, Resident, Aligned>(p, stages + ahead_stage * Tile::kStage, feature0,
                                             column0 + static_cast<int64_t>(ahead_tile) * Tile::kColumns, ahead_chunk);
    }
    ahead_stage = ahead_stage + 1 == Tile::kStages ? 0 : ahead_stage + 1;
    if (++ahead_chunk == chunks) {
      ahead_chunk = 0;
      ++ahead_tile;
    }
  };

  if constexpr (Resident)
    load_lora_B<Aligned>(p, b_rows, resident_pitch, feature0, Tile::kFeatures, 0, chunks * Tile::kChunk);
  load_weight_piece<T, Tile, Aligned, Transposed>(p, w_tiles, feature0, column0, 0, 1);
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    load_ahead();
    copy_commit();
  }

  float sums[4][2] = {};
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    float result[4][2 * NT][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_wait<Tile::kStages - 2>();
      // All see this chunk; and all have left the chunk before, whose stage is filled next, and the tile before.
      __syncthreads();
      load_ahead();
      if (tile + 1 < tiles) {
        load_weight_piece<T, Tile, Aligned, Transposed>(p, w_tiles + (tile + 1) % 2 * Tile::kSizeW, feature0,
                                                        column0 + static_cast<int64_t>(tile + 1) * Tile::kColumns,
                                                        chunk, chunks);
      }
      copy_commit();

      const T* a_chunk = stages + stage * Tile::kStage;
      const T* b_chunk = Resident ? b_rows + chunk * Tile::kChunk : a_chunk + Tile::kSizeA;
      const int b_pitch = Resident ? resident_pitch : Tile::kPitchChunk;
#pragma unroll
      for (int k = 0; k < Tile::kChunk; k += 16) {
        uint32_t a_fragments[NT][4], b_fragments[4][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          load_matrix_x4<true>(a_fragments[n],
                               a_chunk + (k + lane % 16) * Tile::kPitch + (warp_n * NT + n) * 16 + lane / 16 * 8);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          load_matrix_x4<false>(b_fragments[m],
                                b_chunk + (warp_m * 64 + m * 16 + lane % 16) * b_pitch + k + lane / 16 * 8);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            mma_m16n8k16<T>(result[m][2 * n], b_fragments[m], {a_fragments[n][0], a_fragments[n][1]});
            mma_m16n8k16<T>(result[m][2 * n + 1], b_fragments[m], {a_fragments[n][2], a_fragments[n][3]});
          }
        }
      }
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        uint32_t w[4];
        load_weight_fragment<Transposed>(w, w_tiles + tile % 2 * Tile::kSizeW, Tile::kPitch, warp_m * 64 + m * 16,
                                         (warp_n * NT + n) * 16);
        add_squares<T>(sums[m], w, result[m][2 * n], result[m][2 * n + 1], p.scaling);
      }
    }
  }
  copy_wait<0>();
  write_partials<WM, Tile::kWarpsN>(p, sums, reinterpret_cast<float*>(shared_bytes), feature0);
}

}  // namespace dora_ext
