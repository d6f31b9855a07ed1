// The norm of fp32 and fp64 weights, on the CUDA cores: true fp32, never TF32.
//
// A block forms tiles of 128 x 64 numbers of W + s B A; thread (lane x, row y) of 16 x 16 has those at
// "long" index 8 y + i and "short" index x + 16 j. Short runs along W's memory in both layouts, so that W is read
// coalesced, straight into registers, before the product begins:
//
//   W (out, in):  long = features, short = walked columns      W (in, out), Transposed:  long = walked, short =
//   features
#pragma once

#include "norm_common.cuh"

namespace dora_ext {

template <bool Transposed>
struct FmaTile {
  static constexpr int kLong = 128, kShort = 64, kChunk = 16, kThreads = 256;
  static constexpr int kFeatures = Transposed ? kShort : kLong;
  static constexpr int kColumns = Transposed ? kLong : kShort;
  // Padding spreads the transposing stores of lora_B over the banks and keeps rows 16-byte aligned.
  static constexpr int kPitchLong = kLong + 4, kPitchShort = kShort + 4;
};

template <typename T, bool Transposed>
__global__ void __launch_bounds__(256) norm_fma_kernel(NormProblem<T> p, int64_t tiles_per_split) {
  using Tile = FmaTile<Transposed>;
  __shared__ __align__(16) T long_chunk[Tile::kChunk][Tile::kPitchLong];
  __shared__ __align__(16) T short_chunk[Tile::kChunk][Tile::kPitchShort];
  __shared__ T scratch[16][Tile::kFeatures];
  if (!norm_begins(p.fingerprint)) return;

  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const int64_t feature0 = static_cast<int64_t>(blockIdx.x) * Tile::kFeatures;
  const int64_t long_size = Transposed ? p.in : p.out, short_size = Transposed ? p.out : p.in;
  T sums[Transposed ? 4 : 8] = {};

  for (int64_t tile = blockIdx.y * tiles_per_split; tile < (blockIdx.y + 1) * tiles_per_split; ++tile) {
    const int64_t column0 = tile * Tile::kColumns;
    if (column0 >= p.in) break;
    const int64_t long0 = Transposed ? column0 : feature0, short0 = Transposed ? feature0 : column0;

    T w[8][4], product[8][4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t row = long0 + 8 * y + i, column = short0 + x + 16 * j;
        w[i][j] = row < long_size && column < short_size ? p.weight[row * short_size + column] : T(0);
      }
    }

    for (int rank0 = 0; rank0 < p.rank; rank0 += Tile::kChunk) {
      __syncthreads();
      for (int c = threadIdx.x; c < Tile::kChunk * Tile::kColumns; c += Tile::kThreads) {
        const int k = c / Tile::kColumns, column = c % Tile::kColumns;
        const bool valid = rank0 + k < p.rank && column0 + column < p.in;
        (Transposed ? long_chunk[k] : short_chunk[k])[column] =
            valid ? p.lora_A[(rank0 + k) * p.pitch_A + column0 + column] : T(0);
      }
      for (int c = threadIdx.x; c < Tile::kChunk * Tile::kFeatures; c += Tile::kThreads) {
        const int f = c / Tile::kChunk, k = c % Tile::kChunk;
        const bool valid = rank0 + k < p.rank && feature0 + f < p.out;
        (Transposed ? short_chunk[k] : long_chunk[k])[f] = valid ? p.lora_B[(feature0 + f) * p.rank + rank0 + k] : T(0);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < Tile::kChunk; ++k) {
        T of_long[8], of_short[4];
#pragma unroll
        for (int i = 0; i < 8; ++i) of_long[i] = long_chunk[k][8 * y + i];
#pragma unroll
        for (int j = 0; j < 4; ++j) of_short[j] = short_chunk[k][x + 16 * j];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) product[i][j] += of_long[i] * of_short[j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const T v = w[i][j] + p.scaling * product[i][j];
        sums[Transposed ? j : i] += v * v;
      }
    }
  }

  // The 16 threads that share a feature, added in fixed order.
#pragma unroll
  for (int i = 0; i < (Transposed ? 4 : 8); ++i)
    scratch[Transposed ? y : x][Transposed ? x + 16 * i : 8 * y + i] = sums[i];
  __syncthreads();
  for (int f = threadIdx.x; f < Tile::kFeatures && feature0 + f < p.out; f += Tile::kThreads) {
    T sum = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += scratch[i][f];
    p.partials[blockIdx.y * p.out + feature0 + f] = sum;
  }
}

}  // namespace dora_ext
