// norm_rows.cuh turned around, for fp16 and bf16 weights (in, out): a warp keeps its features' rows of lora_B as mma
// fragments and walks along `in`, down the rows of memory.
//
//               out ->         blockIdx.y: a strip of 8 warps' features; lane t of four owns 8 in a row, kPieces times
//   in    16 rows of W         rows 2g and 2g + 1 are a lane's, so that
//    |    16 columns of A      two numbers of a row of lora_A are one load; a block writes one row of partials
#pragma once

#include "norm_rows.cuh"

namespace dora_ext {

// This lane's numbers of the next 16 columns of A, zeros outside: ranks as in RowsOfB, columns 2g and 2g + 1 as its two
// rows. pitch_A is a multiple of 8.
template <int KT, typename T>
__device__ __forceinline__ void load_columns(uint32_t (&a)[2][2 * KT], const NormProblem<T>& p, const T* from,
                                             bool valid) {
  const int left = p.rank - 4 * KT * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2 * KT; ++i) {
    uint32_t pair[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const T* at = from + (2 * i + k) * p.pitch_A;
      pair[k] = valid && left > 2 * i + k ? __ldg(reinterpret_cast<const uint32_t*>(at)) : 0;
    }
    a[0][i] = __byte_perm(pair[0], pair[1], 0x5410);
    a[1][i] = __byte_perm(pair[0], pair[1], 0x7632);
  }
}

template <typename T, typename Tile, int kResident>
__global__ void __launch_bounds__(Tile::kThreads, kRowBlocks<kResident>)
    norm_columns_kernel(NormProblem<T> p, int64_t tiles_per_block) {
  constexpr int KT = Tile::KT, kPairs = Tile::kPieces * Tile::kPairs;
  if (!norm_begins(p.fingerprint)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t feature0 = blockIdx.y * static_cast<int64_t>(Tile::kBlockColumns) + warp * Tile::kColumns;
  const int64_t row0 = blockIdx.x * tiles_per_block * 16;
  const int64_t rows = p.in - row0 < tiles_per_block * 16 ? p.in - row0 : tiles_per_block * 16;
  const int left =
      static_cast<int>(p.out - feature0 - t * 8 < Tile::kColumns ? p.out - feature0 - t * 8 : Tile::kColumns);

  const T* weight_from = p.weight + (row0 + 2 * g) * p.out + feature0 + t * 8;
  const T* a_from = p.lora_A + 4 * KT * t * p.pitch_A + row0 + 2 * g;
  uint4 weight[2][Tile::kPieces] = {}, next_weight[2][Tile::kPieces] = {};
  uint32_t a[2][2 * KT], next_a[2][2 * KT];
  const auto fetch = [&](int64_t row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int piece = 0; piece < Tile::kPieces; ++piece) {
        const bool valid = row + 2 * g + half < rows && left > piece * 32;
        next_weight[half][piece] =
            valid ? __ldg(reinterpret_cast<const uint4*>(weight_from + half * p.out + piece * 32)) : uint4{};
      }
    }
    weight_from += 16 * p.out;
    load_columns<KT>(next_a, p, a_from + row, row + 2 * g < rows);
  };
  fetch(0);

  uint32_t b[kPairs][2 * KT];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int64_t feature = feature0 + (i / 4 * 4 + g / 2) * 8 + i % 4 * 2 + g % 2;
#pragma unroll
    for (int s = 0; s < 2 * KT; ++s) b[i][s] = 0;
    if (feature < p.out) RowsOfB<KT, T>(p, feature).fetch(b[i], 0);
  }

  float sums[kPairs][2] = {};
  for (int64_t row = 0; row < rows; row += 16) {
#pragma unroll
    for (int i = 0; i < 2 * Tile::kPieces; ++i) weight[i % 2][i / 2] = next_weight[i % 2][i / 2];
#pragma unroll
    for (int i = 0; i < 4 * KT; ++i) a[i % 2][i / 2] = next_a[i % 2][i / 2];
    if (row + 16 < rows) fetch(row + 16);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      float d[4] = {};
#pragma unroll
      for (int s = 0; s < KT; ++s) {
        mma_m16n8k16<T>(d, {a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1]},
                        {b[i][2 * s], b[i][2 * s + 1]});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4& v = weight[half][i / 4];
        const float2 w = unpack<T>(i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w);
        const float first = fmaf(p.scaling, d[2 * half], w.x), second = fmaf(p.scaling, d[2 * half + 1], w.y);
        sums[i][0] = fmaf(first, first, sums[i][0]);
        sums[i][1] = fmaf(second, second, sums[i][1]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = sums[i][e];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      const int64_t feature = feature0 + (i / 4 * 4 + t) * 8 + i % 4 * 2 + e;
      if (g == 0 && feature < p.out) p.partials[blockIdx.x * p.out + feature] = sum;
    }
  }
}

}  // namespace dora_ext
