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
    const T* of_rank = p.lora_A + 4 * Tile::KT * t * p.pitch_A + column;
    const int ranks = column < p.in ? p.rank - 4 * Tile::KT * t : 0;
#pragma unroll
    for (int s = 0; s < 2 * Tile::KT; ++s) {
      const uint4* from[2] = {reinterpret_cast<const uint4*>(of_rank),
                              reinterpret_cast<const uint4*>(of_rank + p.pitch_A)};
      of_rank += 2 * p.pitch_A;
#pragma unroll
      for (int part = 0; part < Tile::kWidth / 8; ++part) {
        uint4 row[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (2 * s + i < ranks) row[i] = __ldg(from[i] + part);
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

// Times a power of two: exact, save at the ends of what bf16 can hold.
template <int N, int KT>
__device__ __forceinline__ void scale_columns_of_A(uint32_t (&a)[N][KT][2], float power) {
  const __nv_bfloat162 both = __float2bfloat162_rn(power);
#pragma unroll
  for (int i = 0; i < N * KT * 2; ++i) {
    auto& pair = reinterpret_cast<__nv_bfloat162&>(a[i / (2 * KT)][i / 2 % KT][i % 2]);
    pair = __hmul2(pair, both);
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

// `v`, which the compiler would compute anew in each tile.
__device__ __forceinline__ uint32_t kept(uint32_t v) {
  asm volatile("mov.b32 %0, %0;" : "+r"(v));
  return v;
}

// The block's rows of its strip. `sums`: (kWarps, 16 tiles_per_block) in shared memory.
//   source.start   gets to know the block's part of W         source.take   this tile of it, into registers
//   source.fetch   asks for the tile at a row, or further     source.pair   two of the registers' weights
//   source.share   sets up what the block has in common      source.take_B   if the rows of lora_B are part of that
// Folded: s is a power of two and goes into A. So the tensor cores add W as well: one instruction less for a weight.
template <bool Folded, typename Tile, typename T, typename Source>
__device__ __forceinline__ void walk_rows(const NormProblem<T>& p, int64_t tiles_per_block, Source& source,
                                          float* sums) {
  constexpr int KT = Tile::KT;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column0 = blockIdx.y * static_cast<int64_t>(Tile::kBlockColumns) + warp * Tile::kColumns;
  const int64_t row0 = blockIdx.x * tiles_per_block * 16;
  const int rows = static_cast<int>(p.out - row0 < tiles_per_block * 16 ? p.out - row0 : tiles_per_block * 16);
  const bool odd = lane % 2 == 1;
  float* own_sums = sums + kept(warp * static_cast<int>(tiles_per_block) * 16 + lane / 4 + (odd ? 8 : 0));

  typename Source::Part weight{};
  uint32_t b[2][2 * KT] = {}, next_b[2][2 * KT] = {};
  RowsOfB<KT, T> rows_of_B(p, row0 + lane / 4);
  source.start(row0, rows, column0);
  // Where there is no row, what the registers held stays: nobody asks for its sum.
  const auto fetch_b = [&](uint32_t (&to)[2][2 * KT], int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 + lane / 4 < rows) rows_of_B.fetch(to[half], half);
    }
    rows_of_B.from += 2 * rows_of_B.below;
  };
  source.fetch(0);
  constexpr bool kEarlyB = Tile::kEarlyB && !Source::kSharesB;
  if (kEarlyB) fetch_b(next_b, 0);
  uint32_t a[Tile::kPieces * Tile::kPairs][KT][2];
  load_columns_of_A<Tile>(a, p, column0);
  source.share();
  if constexpr (Folded) scale_columns_of_A(a, p.scaling);

  for (int row = 0; row < rows; row += 16) {
    source.take(weight);
    source.fetch(row + 16);
    if constexpr (Source::kSharesB) {
      source.take_B(b, row);
    } else if constexpr (kEarlyB) {
#pragma unroll
      for (int i = 0; i < 4 * KT; ++i) b[i % 2][i / 2] = next_b[i % 2][i / 2];
      fetch_b(next_b, row + 16);
    } else {
      fetch_b(b, row);
    }
    float sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < Tile::kPieces * Tile::kPairs; ++i) {
      const float2 w[2] = {source.pair(weight, 0, i), source.pair(weight, 1, i)};
      float d[4] = {};
      if constexpr (Folded) d[0] = w[0].x, d[1] = w[0].y, d[2] = w[1].x, d[3] = w[1].y;
#pragma unroll
      for (int s = 0; s < KT; ++s) {
        mma_m16n8k16<T>(d, {b[0][2 * s], b[1][2 * s], b[0][2 * s + 1], b[1][2 * s + 1]}, a[i][s]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = Folded ? d[2 * half] : fmaf(p.scaling, d[2 * half], w[half].x);
        const float second = Folded ? d[2 * half + 1] : fmaf(p.scaling, d[2 * half + 1], w[half].y);
        sum[half][0] = fmaf(first, first, sum[half][0]);
        sum[half][1] = fmaf(second, second, sum[half][1]);
      }
    }
    // Even lanes add up rows g, odd ones rows g + 8.
    const float top = sum[0][0] + sum[0][1], bottom = sum[1][0] + sum[1][1];
    float all = (odd ? bottom : top) + __shfl_xor_sync(~0u, odd ? top : bottom, 1);
    all += __shfl_xor_sync(~0u, all, 2);
    if (lane % 4 < 2) own_sums[row] = all;
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
  static constexpr bool kSharesB = false;
  struct Part {
    uint4 words[2][Tile::kPieces];
  };

  const NormProblem<T>& p;
  Part next{};
  const T* from = nullptr;  // this lane's first weight in row g of the next tile
  int64_t below = 0;
  int rows = 0;  // from row g of the block on
  int left = 0;  // columns from this lane's first on, or more than it needs

  __device__ __forceinline__ void start(int64_t row0, int block_rows, int64_t column0) {
    const int g = threadIdx.x % 32 / 4;
    const int64_t column = column0 + threadIdx.x % 4 * 8;
    from = p.weight + (row0 + g) * p.in + column;
    below = 8 * p.in;
    rows = block_rows - g;
    left = static_cast<int>(p.in - column < Tile::kColumns ? p.in - column : Tile::kColumns);
  }

  __device__ __forceinline__ void fetch(int row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 >= rows) continue;
#pragma unroll
      for (int piece = 0; piece < Tile::kPieces; ++piece) {
        if (left > piece * 32) {
          next.words[half][piece] = __ldg(reinterpret_cast<const uint4*>(from + half * below + piece * 32));
        }
      }
    }
    from += 2 * below;
  }

  __device__ __forceinline__ void share() const {}
  __device__ __forceinline__ void take(Part& part) const { part = next; }

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
  if (!norm_begins(p.fingerprint)) return;
  DenseRows<T, Tile> source{p};
  walk_rows<false, Tile>(p, tiles_per_block, source, reinterpret_cast<float*>(shared_bytes));
}

}  // namespace dora_ext
