// The norm of fp16 and bf16 weights for any rank: tiles of B A (product_walk.cuh: left = B, right = A) whose results
// meet W in registers. Bound by the tensor cores rather than by reading W.
//
// A block walks along `in` and may end up in the middle of a row of tiles, so the partials of a row of tiles come from
// several blocks: the first of them writes split 0, and so on; the last one fills the splits that are left with zeros.
//
// not Aligned: rows that don't start on 16 bytes are fetched number by number.
#pragma once

#include "norm_common.cuh"
#include "product_walk.cuh"

namespace dora_ext {

// The most blocks that share a row of `columns` tiles.
__host__ __device__ inline int64_t high_rank_splits(int64_t columns, int64_t tiles_per_block) {
  return (columns - 1 + tiles_per_block - 1) / tiles_per_block + 1;
}

template <typename T, typename Tile, bool Aligned, bool Transposed>
struct HighRankNorm {
  static constexpr bool kRightByRank = true;
  const NormProblem<T>& p;
  const bool aligned_B;
  const int64_t columns, tiles_per_block;
  float* scratch;
  float sums[4][2] = {};

  __device__ __forceinline__ void load_left(T* dst, int64_t row, int chunk) const {
    load_rank_chunk<Tile::kThreads, Tile::kRows, false>(dst, p.lora_B, row * Tile::kRows, p.out, p.rank,
                                                        chunk * Tile::kChunk, false, aligned_B);
  }

  __device__ __forceinline__ void load_right(T* dst, int64_t column, int chunk) const {
    constexpr int kWidth = Tile::kColumns / 8, kStep = Tile::kThreads / kWidth;
    static_assert(Tile::kThreads % kWidth == 0 && kStep % 8 == 0, "a thread's copies are below each other");
    const int k = threadIdx.x / kWidth, c = threadIdx.x % kWidth;
    T* to = dst + tile_at(k, c, Tile::kColumns);
    const T* from = p.lora_A + (chunk * Tile::kChunk + k) * p.pitch_A + column * Tile::kColumns + c * 8;
    const bool inside = Aligned && (chunk + 1) * Tile::kChunk <= p.rank && (column + 1) * Tile::kColumns <= p.pitch_A;
#pragma unroll
    for (int i = 0; i < Tile::kChunk / kStep; ++i) {
      if (inside) {  // nearly always, and short
        copy16_async(to + i * kStep * Tile::kColumns, from + i * kStep * p.pitch_A);
      } else {
        const int rank = chunk * Tile::kChunk + k + i * kStep;
        stage8<Aligned>(to + i * kStep * Tile::kColumns, p.lora_A, p.lora_A + rank * p.pitch_A, rank < p.rank,
                        column * Tile::kColumns + c * 8, p.pitch_A);
      }
    }
  }

  // W's tile (kRows, kColumns), or turned around when Transposed.
  __device__ __forceinline__ void load_beside(T* dst, const TilePlace& place, int begin, int end) const {
    constexpr int kPitch = Transposed ? Tile::kRows : Tile::kColumns;
    constexpr int kWidth = kPitch / 8, kStep = Tile::kThreads / kWidth;
    static_assert(Tile::kThreads % kWidth == 0 && kStep % 8 == 0, "a thread's parts are below each other");
    const int64_t feature0 = place.row * Tile::kRows, column0 = place.column * Tile::kColumns;
    const int64_t rows = Transposed ? p.in : p.out, pitch = Transposed ? p.out : p.in;
    const int64_t row0 = (Transposed ? column0 : feature0) + threadIdx.x / kWidth;
    const int64_t offset = (Transposed ? feature0 : column0) + threadIdx.x % kWidth * 8;
    T* to = dst + tile_at(threadIdx.x / kWidth, threadIdx.x % kWidth, kPitch);
#pragma unroll 2
    for (int part = begin; part < end; ++part) {
      const int64_t row = row0 + part * kStep;
      stage8<Aligned>(to + part * kStep * kPitch, p.weight, p.weight + row * pitch, row < rows, offset, pitch);
    }
  }

  __device__ __forceinline__ void meanwhile(const TilePlace&, int) const {}

  template <int N>
  __device__ __forceinline__ void finish(const float (&result)[4][N][4], const T* w_tile, const TilePlace& place,
                                         bool last) {
    const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % Tile::kWarpsM;
    const int warp_n = threadIdx.x / 32 / Tile::kWarpsM;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < N / 2; ++n) {
        const int feature = warp_m * 64 + m * 16, column = (warp_n * (N / 2) + n) * 16;
        uint32_t w[4];
        if constexpr (Transposed) {
          load_matrix_x4<true>(
              w, w_tile + tile_at(column + lane / 16 * 8 + lane % 8, feature / 8 + lane / 8 % 2, Tile::kRows));
        } else {
          load_matrix_x4<false>(w, w_tile + tile_at(feature + lane % 16, column / 8 + lane / 16, Tile::kColumns));
        }
        add_squares<T>(sums[m], w, result[m][2 * n], result[m][2 * n + 1], p.scaling);
      }
    }
    if (!last) return;
    const int64_t feature0 = place.row * Tile::kRows;
    NormProblem<T> split = p;
    int64_t i = blockIdx.x - place.row * columns / tiles_per_block;
    split.partials += i * p.out;
    write_partials<Tile::kWarpsM, Tile::kWarpsN>(split, sums, scratch, feature0);
    if (place.column + 1 == columns) {
      for (const int64_t splits = high_rank_splits(columns, tiles_per_block); ++i < splits;) {
        for (int f = threadIdx.x; f < Tile::kRows && feature0 + f < p.out; f += Tile::kThreads) {
          p.partials[i * p.out + feature0 + f] = 0.0f;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) sums[m][0] = sums[m][1] = 0.0f;
  }
};

// Blocks that run at once on a multiprocessor, as far as registers go.
template <int NT>
constexpr int kHighRankBlocks = NT == 1 ? 3 : 2;

template <typename T, int WM, int WN, int NT, bool Aligned, bool Transposed>
__global__ void __launch_bounds__(32 * WM * WN, kHighRankBlocks<NT>)
    norm_high_rank_kernel(NormProblem<T> p, int64_t tiles_per_block) {
  using Tile = WalkTile<WM, WN, NT>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ float scratch[Tile::kWarpsN * Tile::kRows];
  if (Tile::kLeastBytes > kSharedLimit || !norm_begins(p.fingerprint)) return;
  const bool aligned_B = Aligned && p.rank % 8 == 0 && reinterpret_cast<uintptr_t>(p.lora_B) % 16 == 0;
  const int64_t columns = (p.in + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t all_tiles = (p.out + Tile::kRows - 1) / Tile::kRows * columns;
  HighRankNorm<T, Tile, Aligned, Transposed> job{p, aligned_B, columns, tiles_per_block, scratch};
  walk_product<T, Tile>(job, reinterpret_cast<T*>(shared_bytes), Tile::chunks(p.rank), columns, all_tiles,
                        tiles_per_block);
}

}  // namespace dora_ext
