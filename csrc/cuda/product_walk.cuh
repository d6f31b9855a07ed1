// D = left right^T in tiles that meet a third matrix of D's shape: W + s B A (norm_high_rank.cuh), base + s h B^T
// (compose_high_rank.cuh). The products' depth is a rank, so a tile is soon done, and what counts is that nothing waits
// between tiles: a block walks its share of all tiles, row by row, and its copies run ahead into the tiles to come.
//
//   right (kColumns x kChunk ranks)   kStages chunks in flight or in use
//   left  (kRows x kChunk ranks)      as many, or all chunks of the row of tiles, which halves the traffic from L2
//   beside (kRows x kColumns)         the third matrix: this tile's, and the next one's where there is room
//
// A warp makes 64 rows x 16 NT columns. With 64 columns it issues 32 products for 8 ldmatrix: fewer, and shared memory
// rather than the tensor cores would be what it waits for.
#pragma once

#include "dtype.cuh"
#include "mma.cuh"

namespace dora_ext {

template <int WM, int WN, int NT>
struct WalkTile {
  static constexpr int kWarpsM = WM, kWarpsN = WN, kColumnFragments = NT;
  static constexpr int kThreads = 32 * WM * WN;
  static constexpr int kRows = 64 * WM, kColumns = 16 * NT * WN;
  static constexpr int kChunk = 32, kStages = 3;
  static constexpr int kLeft = kRows * kChunk, kRight = kColumns * kChunk, kBeside = kRows * kColumns;
  static constexpr int kBesideParts = kBeside / 8 / kThreads;  // of 16 bytes for every thread
  static constexpr int64_t kLeastBytes = 2 * (kStages * (kLeft + kRight) + kBeside);

  // At least kStages, of zeros when the rank is small: the copies run kStages chunks ahead, and left's resident chunks
  // must not be replaced before they were used.
  __host__ __device__ static int chunks(int rank) {
    const int needed = (rank + kChunk - 1) / kChunk;
    return needed < kStages ? kStages : needed;
  }
};

// How the shared memory of a block is used.
struct WalkMemory {
  int left_slots;  // kStages, or the number of chunks: resident
  int besides;     // 1 or 2; 0: the tile does not fit at all
  int64_t bytes;
};

// The first that fits in `limit` bytes. A kernel gives the bytes that it was launched with, and finds the same answer.
template <typename Tile>
__host__ __device__ inline WalkMemory walk_memory(int chunks, int64_t limit) {
  for (int choice = 0; choice < 4; ++choice) {
    const int left_slots = choice < 2 ? chunks : Tile::kStages, besides = 2 - choice % 2;
    const int64_t bytes =
        2 * (int64_t{Tile::kStages} * Tile::kRight + int64_t{left_slots} * Tile::kLeft + besides * Tile::kBeside);
    if (bytes <= limit) return {left_slots, besides, bytes};
  }
  return {};
}

__device__ __forceinline__ uint32_t dynamic_shared_bytes() {
  uint32_t bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// Layouts in shared memory: the 16 bytes at (row, 8 c) of a tile are dealt so that the 8 rows which ldmatrix reads at a
// time lie in different banks.

// Rows of kChunk = 32 ranks, 64 bytes.
__host__ __device__ __forceinline__ constexpr int chunk_at(int row, int c) {
  return row * 32 + (c ^ (row >> 1 & 3)) * 8;
}

// Rows of `pitch` numbers, a multiple of 64.
__host__ __device__ __forceinline__ constexpr int tile_at(int row, int c, int pitch) {
  return row * pitch + (c ^ (row & 7)) * 8;
}

// mma leaves a lane two neighbouring columns of every 8. To give it eight neighbouring ones instead (16 bytes), the
// columns of a group of 32 are dealt to four products so: column i of product j is column (i / 2) * 8 + j * 2 + i % 2
// of the group. Lane t of a quad then holds columns 8 t ... 8 t + 7 in its products 0 ... 3, and a quad covers 64 bytes
// of a row. The deal is made when the right factor's rows are put into shared memory: where row f lies.
__device__ __forceinline__ int dealt_row(int f) {
  return (f & ~31) | (f >> 1 & 3) << 3 | (f >> 3 & 3) << 1 | (f & 1);
}

// kRows rows of src (rows, rank) from row0 on, ranks rank0 to rank0 + 31, or with `half` to + 15; zeros outside.
// aligned: src's rows start on 16 bytes.
template <int kThreads, int kRows, bool Dealt, typename T>
__device__ __forceinline__ void load_rank_chunk(T* dst, const T* src, int64_t row0, int64_t rows, int rank, int rank0,
                                                bool half, bool aligned) {
  if (aligned && rank0 + 32 <= rank && row0 + kRows <= rows) {  // nearly always, and short
    constexpr int kStep = kThreads / 4;
    static_assert(kStep % 32 == 0 && kRows % kStep == 0, "the same place in every group of 32 rows");
    const int row = threadIdx.x / 4, c = threadIdx.x % 4;
    const T* from = src + (row0 + row) * rank + rank0 + c * 8;
    T* to = dst + chunk_at(Dealt ? dealt_row(row) : row, c);
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) copy16_async(to + i * kStep * 32, from + int64_t{i} * kStep * rank);
    return;
  }
  const int shift = half ? 1 : 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows << shift; i += kThreads) {
    const int row = i >> shift, c = i & ((1 << shift) - 1), k = rank0 + c * 8;
    const bool valid = row0 + row < rows && k < rank;
    const T* from = src + (valid ? (row0 + row) * rank + k : 0);
    T* to = dst + chunk_at(Dealt ? dealt_row(row) : row, c);
    if (aligned) {
      copy16_async(to, from, valid);
    } else {
      __align__(16) T numbers[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) numbers[n] = valid && k + n < rank ? from[n] : narrow<T>(0.0f);
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(numbers);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The walk

struct TilePlace {
  int64_t row, column;  // in tiles

  __device__ __forceinline__ void advance(int64_t columns) {
    if (++column == columns) {
      column = 0;
      ++row;
    }
  }
};

// What a job does, all threads together:
//   kRightByRank                                 right's chunks are (kChunk, kColumns) in tile_at's layout, not
//                                                (kColumns, kChunk) in chunk_at's
//   load_left(T*, row, chunk), load_right(T*, column, chunk)
//   load_beside(T*, TilePlace, begin, end)       parts of the third matrix, of kBesideParts, in a layout of its own
//   meanwhile(TilePlace, chunk)                  once per chunk of the tile in work, each behind a barrier
//   finish(sums, const T* beside, TilePlace, bool last)
//                                                the tile is done; last: of its row in this block. sums[m][n] are the
//                                                mma results of rows 16 m and columns 8 n of the warp.
template <typename T, typename Tile, typename Job>
__device__ __forceinline__ void walk_product(Job& job, T* shared, int chunks, int64_t columns, int64_t all_tiles,
                                             int64_t tiles_per_block) {
  constexpr int NT = Tile::kColumnFragments, kStages = Tile::kStages;
  const WalkMemory memory = walk_memory<Tile>(chunks, dynamic_shared_bytes());
  const bool resident = memory.left_slots == chunks, two = memory.besides == 2;
  T* rights = shared;
  T* lefts = rights + kStages * Tile::kRight;
  T* besides = lefts + memory.left_slots * Tile::kLeft;

  const int64_t first = blockIdx.x * tiles_per_block;
  const int tiles = static_cast<int>(all_tiles - first < tiles_per_block ? all_tiles - first : tiles_per_block);
  TilePlace place{first / columns, first % columns};

  // What the copies have come to: chunk `ahead_chunk` of tile `ahead_tile`, into stage `ahead_stage`.
  TilePlace ahead = place;
  int ahead_tile = 0, ahead_chunk = 0, ahead_stage = 0;
  bool new_row = true;
  const auto load_ahead = [&] {
    if (ahead_tile < tiles) {
      job.load_right(rights + ahead_stage * Tile::kRight, ahead.column, ahead_chunk);
      if (!resident || new_row) {
        job.load_left(lefts + (resident ? ahead_chunk : ahead_stage) * Tile::kLeft, ahead.row, ahead_chunk);
      }
    }
    ahead_stage = ahead_stage + 1 == kStages ? 0 : ahead_stage + 1;
    if (++ahead_chunk == chunks) {
      ahead_chunk = 0;
      ++ahead_tile;
      ahead.advance(columns);
      new_row = ahead.column == 0;
    }
  };

  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % Tile::kWarpsM,
            warp_n = threadIdx.x / 32 / Tile::kWarpsM;
  const int left_lane = chunk_at(warp_m * 64 + lane % 16, lane / 16);
  int right_lane[Job::kRightByRank ? NT : 1];
  if constexpr (Job::kRightByRank) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      right_lane[n] = tile_at(lane % 16, (warp_n * NT + n) * 2 + lane / 16, Tile::kColumns);
    }
  } else {
    right_lane[0] = chunk_at(warp_n * NT * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }

  struct Fragments {
    uint32_t left[4][4], right[NT][4];
  } fragments[2];
  // Of the first or the second 16 ranks of a chunk.
  const auto load_fragments = [&](Fragments& f, int stage, int chunk, int half) {
    const T* left = lefts + (resident ? chunk : stage) * Tile::kLeft + (left_lane ^ half * 16);
    const T* right = rights + stage * Tile::kRight;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      if constexpr (Job::kRightByRank) {
        load_matrix_x4<true>(f.right[n], right + right_lane[n] + half * 16 * Tile::kColumns);
      } else {
        load_matrix_x4<false>(f.right[n], right + (right_lane[0] ^ half * 16) + n * 16 * Tile::kChunk);
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) load_matrix_x4<false>(f.left[m], left + m * 16 * Tile::kChunk);
  };

#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    load_ahead();
    if (s == kStages - 1 && two) job.load_beside(besides, place, 0, Tile::kBesideParts);
    copy_commit();
  }
  copy_wait<kStages - 1>();
  __syncthreads();
  load_fragments(fragments[0], 0, 0, 0);

  // Copies of a beside tile that are asked for before the last kStages - 1 chunks have arrived when the tile is done.
  const int beside_chunks = two ? chunks : chunks - kStages + 1;
  const int parts = (Tile::kBesideParts + beside_chunks - 1) / beside_chunks;
  int stage = 0;
  TilePlace next = place;
  for (int tile = 0; tile < tiles; ++tile) {
    next.advance(columns);
    float sums[4][2 * NT][4] = {};
    const auto multiply = [&](const Fragments& f) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          mma_m16n8k16<T>(sums[m][2 * n], f.left[m], {f.right[n][0], f.right[n][1]});
          mma_m16n8k16<T>(sums[m][2 * n + 1], f.left[m], {f.right[n][2], f.right[n][3]});
        }
      }
    };
    const TilePlace beside_place = two ? next : place;
    T* beside_to = besides + (two ? (tile + 1) % 2 * Tile::kBeside : 0);
    int part = two && tile + 1 == tiles ? Tile::kBesideParts : 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      load_fragments(fragments[1], stage, chunk, 1);
      multiply(fragments[0]);
      copy_wait<kStages - 2>();
      // All see the next chunk; and all have left this one, whose stage is filled next, and the tile before.
      __syncthreads();
      stage = stage + 1 == kStages ? 0 : stage + 1;
      // After the last chunk of all this reads what lies there, and nobody uses it.
      load_fragments(fragments[0], stage, chunk + 1 == chunks ? 0 : chunk + 1, 0);
      load_ahead();
      if (part < Tile::kBesideParts) {
        const int end = part + parts < Tile::kBesideParts ? part + parts : Tile::kBesideParts;
        job.load_beside(beside_to, beside_place, part, end);
        part = end;
      }
      copy_commit();
      job.meanwhile(place, chunk);
      multiply(fragments[1]);
    }
    job.finish(sums, besides + (two ? tile % 2 * Tile::kBeside : 0), place, tile + 1 == tiles || next.column == 0);
    place = next;
  }
}

}  // namespace dora_ext
