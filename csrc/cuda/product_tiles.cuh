// What product_kernel.cuh multiplies: the problem, its tiles in shared memory, and who takes which when.
#pragma once

#include "launches.cuh"
#include "product_async.cuh"

namespace dora_ext {

// left (rows, inner) and left_tail (rows, tail); right (columns, inner) and right_tail (columns, tail), or, transposed,
// (inner, columns) and (tail, columns); result (rows, columns). The boxes are those of HopperTile.
struct ProductMaps {
  CUtensorMap left, right, left_tail, right_tail, result;
};

struct ProductProblem {
  const float* gain;               // (columns,), on 8 bytes, or null: 1
  const float* bias;               // (columns,), on 8 bytes, or null: 0
  int rows, columns, inner, tail;  // columns, inner and tail are multiples of 8
  int group;                       // of rows of tiles that are walked down before the next column of tiles
  int first;                       // numbers before those of the tiles: clusters that make something first
  int last;                        // numbers after them: of what is made last (product_last.cuh)
  bool spread;                     // see counters
  // Two zeros that are left as zeros: how many tiles were taken, and how many clusters have found none. No two products
  // at once may share them. Null: of n clusters, each takes every n-th tile, and those that the last round leaves idle
  // share what is made last, or, if `spread`, take it first.
  unsigned* counters;
};

// A cluster of two: a block alone was 1.5% faster at best (2048 x 4096 x 4096) and 9% slower at worst (1024 rows).
template <int kColumns_>
struct HopperTile {
  static constexpr int kColumns = kColumns_, kCluster = 2;
  static constexpr int kRows = 128, kInner = 64;
  static constexpr int kThreads = 384;
  static constexpr int kLeftBytes = kRows * kInner * 2, kRightBytes = kColumns * kInner * 2;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kStages = 192 * 1024 / kStageBytes;
  // Result: boxes of 64 rows x 64 columns, two for each warpgroup, so that one is stored while one is filled.
  static constexpr int kBoxBytes = 64 * 64 * 2;
  static constexpr int kResultAt = kStages * kStageBytes;
  static constexpr int kBarriersAt = kResultAt + 4 * kBoxBytes;
  // The numbers of the cluster's tiles, in turn, and the barriers that say they are there. The thread that fetches is
  // at most kStages tiles ahead of those that multiply, so that nobody needs a number any more when it is overwritten.
  static constexpr int kNumbers = 8, kNumbersAt = kBarriersAt + 2 * kStages * 8;
  static constexpr int kSharedBytes = kNumbersAt + kNumbers * (8 + 4);
  static constexpr int kPartOfRight = kColumns / kCluster;  // the columns that a block fetches for all
  static_assert(kStages + 1 < kNumbers, "see kNumbers");
  static_assert(kPartOfRight % 64 == 0 && kSharedBytes <= 227 * 1024, "see the TMA's boxes, and what a block can have");
};

// Where a thread is in the ring; both sides walk it in step.
template <int Stages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The tiles of a cluster, one after another. Numbered down the rows of a group of tiles, then column by column, so that
// what runs at once is nearly square and finds the operands in L2.
template <typename Tile>
struct TileWalk {
  const ProductProblem& p;
  int rows_of_tiles, columns_of_tiles, number;
  uint32_t numbers;         // where they are told, or 0: dealt out beforehand
  int taken = 0;            // tiles, by this cluster
  int row = 0, column = 0;  // of the tile, in numbers
  int stretch = -1;         // or else the number of what is made first, or last

  __device__ __forceinline__ TileWalk(const ProductProblem& p, uint32_t shared)
      : p(p),
        rows_of_tiles((p.rows + Tile::kCluster * Tile::kRows - 1) / (Tile::kCluster * Tile::kRows)),
        columns_of_tiles((p.columns + Tile::kColumns - 1) / Tile::kColumns),
        number(static_cast<int>(blockIdx.x) / Tile::kCluster),
        numbers(p.counters != nullptr ? shared + Tile::kNumbersAt : 0) {}

  __device__ __forceinline__ bool advance() {
    if (numbers != 0) {
      const int slot = taken % Tile::kNumbers;
      barrier_wait_for_cluster(numbers + slot * 8, taken / Tile::kNumbers % 2);
      number = static_cast<int>(load_shared(numbers + Tile::kNumbers * 8 + slot * 4));
    } else if (taken > 0) {
      number += step();
    }
    ++taken;
    stretch = number < p.first ? number : -1;
    if (stretch >= 0) return true;
    const int tile = number - p.first, all = rows_of_tiles * columns_of_tiles;
    if (tile >= all) {
      stretch = tile - all;
      return stretch < p.last &&
             (numbers != 0 || p.spread || static_cast<int>(blockIdx.x) / Tile::kCluster >= in_last_round());
    }
    const int in_group = p.group * columns_of_tiles, first_row = tile / in_group * p.group, within = tile % in_group;
    const int rows_here = min(p.group, rows_of_tiles - first_row);
    row = ((first_row + within % rows_here) * Tile::kCluster + static_cast<int>(cluster_rank())) * Tile::kRows;
    column = within / rows_here * Tile::kColumns;
    return true;
  }

  // Where numbers are dealt out: clusters that have a tile in a last round that is not full; and how far the next
  // number is from this one.
  __device__ __forceinline__ int in_last_round() const {
    return (p.first + rows_of_tiles * columns_of_tiles) % (static_cast<int>(gridDim.x) / Tile::kCluster);
  }
  __device__ __forceinline__ int step() const {
    const int clusters = static_cast<int>(gridDim.x) / Tile::kCluster;
    const bool all = p.spread || number < p.first + rows_of_tiles * columns_of_tiles;
    return all ? clusters : clusters - in_last_round();
  }

  // `next`: of the tile after those that were told.
  __device__ __forceinline__ void tell(uint32_t next) const {
    const int slot = taken % Tile::kNumbers;
#pragma unroll
    for (int rank = 0; rank < Tile::kCluster; ++rank) {
      tell_number_at(numbers + Tile::kNumbers * 8 + slot * 4, next, numbers + slot * 8, rank);
    }
  }
};

}  // namespace dora_ext
