// The norm of fp16 and bf16 weights (out, in) for ranks up to 64, dense or packed in NF4: bound by reading W, so W goes
// from memory into the registers that need it, and nothing waits for anything else.
//
//               in ->          blockIdx.y: a strip of 8 warps' columns; a warp keeps its columns of lora_A as mma
//                              fragments and walks down 16 rows at a time
//   out   16 rows of W         lane t of four owns kWidth columns in a row (16 bytes, or 8) of rows g and g + 8
//    |    16 rows of lora_B    straight into a fragment, four (eight, sixteen) ranks in a row a lane
//
// A sum over columns and ranks may take them in any order: columns 2t, 2t + 1 of the j-th mma of a piece are the j-th
// pair that lane t owns, and ranks 2t, 2t + 1, 2t + 8, 2t + 9 of the s-th step are the s-th four that it owns. So
// nothing changes lanes, and no weight passes through shared memory.
#pragma once

#include "norm_common.cuh"

namespace dora_ext {

constexpr int kMostRowTiles = 64;  // of 16 rows, in a block: their sums wait in shared memory

// kWidth columns in a row, kPieces times, 4 kWidth columns apart, are a lane's.
template <int KT_, int kWarps_, int kWidth_, int kPieces_>
struct RowTile {
  static constexpr int KT = KT_, kWarps = kWarps_, kWidth = kWidth_, kPieces = kPieces_;
  static constexpr bool kEarlyB = KT < 4;  // lora_B's rows come a tile ahead, registers permitting
  static constexpr int kPairs = kWidth / 2;
  static constexpr int kColumns = 4 * kWidth * kPieces;  // of a warp
  static constexpr int kBlockColumns = kWarps * kColumns;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRank = 16 * KT;
};

// The warp's columns of A, zeros outside. pitch_A and in are multiples of 8 and of kWidth; A is 16-byte aligned.
template <typename Tile, typename T>
__device__ __forceinline__ void load_columns_of_A(uint32_t (&a)[Tile::kPieces * Tile::kPairs][Tile::KT][2],
                                                  const NormProblem<T>& p, int64_t column0) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int parity = g % 2 == 0 ? 0x5410 : 0x7632;
#pragma unroll
  for (int piece = 0; piece < Tile::kPieces; ++piece) {
    const int64_t column = column0 + (piece * 4 + g / 2) * Tile::kWidth;
#pragma unroll
    for (int part = 0; part < Tile::kWidth / 8; ++part) {
#pragma unroll
      for (int s = 0; s < 2 * Tile::KT; ++s) {
        uint4 row[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int k = 4 * Tile::KT * t + 2 * s + i;
          const T* from = p.lora_A + k * p.pitch_A + column + part * 8;
          row[i] = k < p.rank && column < p.in ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{};
        }
        const int pair = piece * Tile::kPairs + part * 4;
        a[pair][s / 2][s % 2] = __byte_perm(row[0].x, row[1].x, parity);
        a[pair + 1][s / 2][s % 2] = __byte_perm(row[0].y, row[1].y, parity);
        a[pair + 2][s / 2][s % 2] = __byte_perm(row[0].z, row[1].z, parity);
        a[pair + 3][s / 2][s % 2] = __byte_perm(row[0].w, row[1].w, parity);
      }
    }
  }
}

// This lane's ranks of rows of B, which start on 16 bytes; above rank 16 the rank is a multiple of 8.
template <int KT, typename T>
struct RowsOfB {
  const T* from;  // first of this lane's ranks in row g of the next tile
  int below;      // numbers to row g + 8
  int left;       // ranks from there on
  bool vectors;

  __device__ __forceinline__ RowsOfB(const NormProblem<T>& p, int64_t row)
      : from(p.lora_B + row * p.rank + 4 * KT * (threadIdx.x % 4)),
        below(8 * p.rank),
        left(p.rank - 4 * KT * static_cast<int>(threadIdx.x % 4)),
        vectors(KT > 1 || p.rank % 4 == 0) {}

  __device__ __forceinline__ void fetch(uint32_t (&b)[2 * KT], int half) const {
    const T* row = from + half * below;
    if constexpr (KT == 1) {
      if (vectors) {
        const uint2 v = left > 0 ? __ldg(reinterpret_cast<const uint2*>(row)) : uint2{};
        b[0] = v.x, b[1] = v.y;
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          b[i] = pack<T>(left > 2 * i ? widen(row[2 * i]) : 0.f, left > 2 * i + 1 ? widen(row[2 * i + 1]) : 0.f);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < KT / 2; ++i) {
        const uint4 v = left > 8 * i ? __ldg(reinterpret_cast<const uint4*>(row) + i) : uint4{};
        b[4 * i] = v.x, b[4 * i + 1] = v.y, b[4 * i + 2] = v.z, b[4 * i + 3] = v.w;
      }
    }
  }
};

// The block's rows of its strip. `sums`: (kWarps, 16 tiles_per_block) in shared memory.
//   source.fetch    asks for a lane's part of a row of the next tile       source.advance   to the tile after
//   source.prepare  makes a part ready                                     source.pair      two weights of it
template <typename Tile, typename T, typename Source>
__device__ __forceinline__ void walk_rows(const NormProblem<T>& p, int64_t tiles_per_block, Source& source,
                                          float* sums) {
  constexpr int KT = Tile::KT;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column0 = blockIdx.y * static_cast<int64_t>(Tile::kBlockColumns) + warp * Tile::kColumns;
  const int64_t row0 = blockIdx.x * tiles_per_block * 16;
  const int rows = static_cast<int>(p.out - row0 < tiles_per_block * 16 ? p.out - row0 : tiles_per_block * 16);

  typename Source::Part weight{}, next_weight{};
  uint32_t b[2][2 * KT] = {}, next_b[2][2 * KT] = {};
  RowsOfB<KT, T> rows_of_B(p, row0 + lane / 4);
  source.start(row0 + lane / 4, column0);
  // Where there is no row, what the registers held stays: nobody asks for its sum.
  const auto fetch_weight = [&](int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 + lane / 4 < rows) source.fetch(next_weight, half);
    }
    source.advance();
  };
  const auto fetch_b = [&](uint32_t (&to)[2][2 * KT], int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 + lane / 4 < rows) rows_of_B.fetch(to[half], half);
    }
    rows_of_B.from += 2 * rows_of_B.below;
  };
  fetch_weight(0);
  if (Tile::kEarlyB) fetch_b(next_b, 0);
  uint32_t a[Tile::kPieces * Tile::kPairs][KT][2];
  load_columns_of_A<Tile>(a, p, column0);
  source.share();

  for (int row = 0; row < rows; row += 16) {
    weight = next_weight;
    fetch_weight(row + 16);
    if constexpr (Tile::kEarlyB) {
#pragma unroll
      for (int i = 0; i < 4 * KT; ++i) b[i % 2][i / 2] = next_b[i % 2][i / 2];
      fetch_b(next_b, row + 16);
    } else {
      fetch_b(b, row);
    }
    source.prepare(weight);
    float sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < Tile::kPieces * Tile::kPairs; ++i) {
      const float2 w[2] = {source.pair(weight, 0, i), source.pair(weight, 1, i)};
      float d[4] = {};
#pragma unroll
      for (int s = 0; s < KT; ++s) {
        mma_m16n8k16<T>(d, {b[0][2 * s], b[1][2 * s], b[0][2 * s + 1], b[1][2 * s + 1]}, a[i][s]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = fmaf(p.scaling, d[2 * half], w[half].x);
        const float second = fmaf(p.scaling, d[2 * half + 1], w[half].y);
        sum[half][0] = fmaf(first, first, sum[half][0]);
        sum[half][1] = fmaf(second, second, sum[half][1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = sum[half][0] + sum[half][1];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      if (lane % 4 == 0) sums[warp * static_cast<int>(tiles_per_block) * 16 + row + half * 8 + lane / 4] = all;
    }
  }

  __syncthreads();
  for (int i = threadIdx.x; i < rows; i += Tile::kThreads) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < Tile::kWarps; ++w) sum += sums[w * static_cast<int>(tiles_per_block) * 16 + i];
    p.partials[blockIdx.y * p.out + row0 + i] = sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Dense weights

template <typename T, typename Tile>
struct DenseRows {
  static_assert(Tile::kWidth == 8, "16 bytes");
  struct Part {
    uint4 words[2][Tile::kPieces];
  };

  const NormProblem<T>& p;
  const T* from = nullptr;
  int64_t below = 0;
  int left = 0;  // columns from this lane's first on, or more than it needs

  __device__ __forceinline__ void start(int64_t row, int64_t column0) {
    const int64_t column = column0 + threadIdx.x % 4 * 8;
    from = p.weight + row * p.in + column;
    below = 8 * p.in;
    left = static_cast<int>(p.in - column < Tile::kColumns ? p.in - column : Tile::kColumns);
  }

  __device__ __forceinline__ void fetch(Part& part, int half) const {
#pragma unroll
    for (int piece = 0; piece < Tile::kPieces; ++piece) {
      if (left > piece * 32) {
        part.words[half][piece] = __ldg(reinterpret_cast<const uint4*>(from + half * below + piece * 32));
      }
    }
  }

  __device__ __forceinline__ void advance() { from += 2 * below; }
  __device__ __forceinline__ void share() const {}
  __device__ __forceinline__ void prepare(Part&) const {}

  __device__ __forceinline__ float2 pair(const Part& part, int half, int i) const {
    const uint4& v = part.words[half][i / 4];
    return unpack<T>(i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w);
  }
};

template <typename Tile>
constexpr int64_t row_sums_bytes(int64_t tiles_per_block) {
  return 4 * 16 * Tile::kWarps * tiles_per_block;
}

// Blocks on a multiprocessor that registers are kept for. sm_75 needs them to do what it has no instructions for.
template <int kWanted>
constexpr int kRowBlocks = kBeforeAmpere ? 1 : kWanted;

template <typename T, typename Tile, int kResident>
__global__ void __launch_bounds__(Tile::kThreads, kRowBlocks<kResident>)
    norm_rows_kernel(NormProblem<T> p, int64_t tiles_per_block) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  if (!is_stale(p.fingerprint)) return;
  DenseRows<T, Tile> source{p};
  walk_rows<Tile>(p, tiles_per_block, source, reinterpret_cast<float*>(shared_bytes));
}

}  // namespace dora_ext
