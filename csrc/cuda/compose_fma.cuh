// compose on the CUDA cores: fp32 and fp64, and every dtype with the channels first. A block of
// 256 threads makes 64 rows x 16 TN columns, columns neighbours in memory; both factors pass through shared memory in
// chunks of 16 ranks, widened to the accumulator.
//
//                     rows       columns                rank-one factor of rows   of columns
//   features last     tokens     features               h (tokens, rank)          lora_B (out, rank)
//   channels first    channels   positions of a sample  lora_B (out, rank)        h (rank, length) of the sample
#pragma once

#include "compose_common.cuh"

namespace dora_ext {

template <typename T, bool Aligned>
struct ComposeFmaTile {
  static constexpr int kThreads = 256, kRanks = 16;
  static constexpr int kTM = 4, kTN = 4;  // a thread's rows and columns
  static constexpr int kRows = 16 * kTM, kColumns = 16 * kTN;
  static constexpr int kRowPitch = kRows + 4;
};

// Aligned: base and result start on 16 bytes and their rows are whole numbers of TN elements. A thread then holds TN
// neighbouring columns, otherwise every 16th.
template <typename T, bool ChannelsFirst, bool Aligned>
__global__ void __launch_bounds__(256, sizeof(T) == 8 ? 1 : 2)
    compose_fma_kernel(ComposeProblem<T> p, int64_t row_tiles, int64_t column_tiles) {
  using Tile = ComposeFmaTile<T, Aligned>;
  using Acc = accumulate_t<T>;
  constexpr int TM = Tile::kTM, TN = Tile::kTN;
  using Packed = Pack<T, Aligned ? TN : 1>;
  __shared__ __align__(16) Acc row_factor[Tile::kRanks][Tile::kRowPitch];
  __shared__ __align__(16) Acc column_factor[Tile::kRanks][Tile::kColumns];

  const int64_t row0 = blockIdx.x / column_tiles % row_tiles * Tile::kRows;
  const int64_t column0 = blockIdx.x % column_tiles * Tile::kColumns;
  const int64_t sample = blockIdx.x / column_tiles / row_tiles;
  const int64_t rows = ChannelsFirst ? p.out : p.tokens, columns = ChannelsFirst ? p.length : p.out;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const auto column = [&](int i) { return Aligned ? tx * TN + i : tx + 16 * i; };

  // Under way while the products are formed.
  T base[TM][TN];
#pragma unroll
  for (int m = 0; m < TM; ++m) {
    const int64_t row = row0 + ty * TM + m;
    const int64_t from = row >= rows ? -1 : p.rows == nullptr ? sample * rows + row : p.rows[row];
#pragma unroll
    for (int i = 0; i < TN; i += Aligned ? TN : 1) {
      Packed pack;
      if (from >= 0 && column0 + column(i) < columns) {
        pack = *reinterpret_cast<const Packed*>(p.base + from * columns + column0 + column(i));
      } else {
#pragma unroll
        for (T& v : pack.v) v = narrow<T>(nanf(""));
      }
#pragma unroll
      for (int n = 0; n < (Aligned ? TN : 1); ++n) base[m][i + n] = pack.v[n];
    }
  }

  const T* row_source = ChannelsFirst ? p.lora_B : p.h;
  const T* column_source = ChannelsFirst ? p.h + sample * p.rank * p.length : p.lora_B;
  Acc sums[TM][TN] = {};
  for (int rank0 = 0; rank0 < p.rank; rank0 += Tile::kRanks) {
    if (rank0 > 0) __syncthreads();
    for (int e = threadIdx.x; e < Tile::kRows * Tile::kRanks; e += Tile::kThreads) {
      const int row = e / Tile::kRanks, k = e % Tile::kRanks;
      const bool valid = row0 + row < rows && rank0 + k < p.rank;
      row_factor[k][row] = valid ? widen(row_source[(row0 + row) * p.rank + rank0 + k]) : Acc(0);
    }
    for (int e = threadIdx.x; e < Tile::kColumns * Tile::kRanks; e += Tile::kThreads) {
      const int c = ChannelsFirst ? e % Tile::kColumns : e / Tile::kRanks;
      const int k = ChannelsFirst ? e / Tile::kColumns : e % Tile::kRanks;
      const bool valid = column0 + c < columns && rank0 + k < p.rank;
      const int64_t at = ChannelsFirst ? (rank0 + k) * p.length + column0 + c : (column0 + c) * p.rank + rank0 + k;
      column_factor[k][c] = valid ? widen(column_source[at]) : Acc(0);
    }
    __syncthreads();
#pragma unroll 2
    for (int k = 0; k < Tile::kRanks; ++k) {
      Acc left[TM], right[TN];
#pragma unroll
      for (int m = 0; m < TM; ++m) left[m] = row_factor[k][ty * TM + m];
#pragma unroll
      for (int i = 0; i < TN; ++i) right[i] = column_factor[k][column(i)];
#pragma unroll
      for (int m = 0; m < TM; ++m) {
#pragma unroll
        for (int i = 0; i < TN; ++i) sums[m][i] = fma(left[m], right[i], sums[m][i]);
      }
    }
  }

  ComposeFactors<Acc> factors[ChannelsFirst ? 1 : TN];
  if constexpr (!ChannelsFirst) {
#pragma unroll
    for (int i = 0; i < TN; ++i) factors[i] = compose_factors(p, column0 + column(i));
  }
#pragma unroll
  for (int m = 0; m < TM; ++m) {
    const int64_t row = row0 + ty * TM + m;
    if (row >= rows) break;
    if constexpr (ChannelsFirst) factors[0] = compose_factors(p, row);
#pragma unroll
    for (int i = 0; i < TN; i += Aligned ? TN : 1) {
      Packed pack;
#pragma unroll
      for (int n = 0; n < (Aligned ? TN : 1); ++n) {
        const int f = ChannelsFirst ? 0 : i + n;
        pack.v[n] = narrow<T>(factors[f].apply(widen(base[m][i + n]), sums[m][i + n]));
      }
      if (column0 + column(i) < columns) store(p.result + (sample * rows + row) * columns + column0 + column(i), pack);
    }
  }
}

template <bool ChannelsFirst, bool Aligned, typename T>
void launch_compose_fma_tiles(const ComposeProblem<T>& p, int64_t rows, int64_t columns, cudaStream_t stream) {
  using Tile = ComposeFmaTile<T, Aligned>;
  const int64_t row_tiles = ceil_div<int64_t>(rows, Tile::kRows);
  const int64_t column_tiles = ceil_div<int64_t>(columns, Tile::kColumns);
  const int64_t blocks = row_tiles * column_tiles * (ChannelsFirst ? p.batch : 1);
  compose_fma_kernel<T, ChannelsFirst, Aligned>
      <<<static_cast<unsigned>(blocks), Tile::kThreads, 0, stream>>>(p, row_tiles, column_tiles);
}

template <bool ChannelsFirst, typename T>
void launch_compose_fma(const ComposeProblem<T>& p, cudaStream_t stream) {
  const int64_t rows = ChannelsFirst ? p.out : p.tokens, columns = ChannelsFirst ? p.length : p.out;
  if (columns % ComposeFmaTile<T, true>::kTN == 0 && on_16_bytes(p.base) && on_16_bytes(p.result)) {
    launch_compose_fma_tiles<ChannelsFirst, true>(p, rows, columns, stream);
  } else {
    launch_compose_fma_tiles<ChannelsFirst, false>(p, rows, columns, stream);
  }
}

}  // namespace dora_ext
