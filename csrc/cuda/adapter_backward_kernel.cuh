// adapter_backward in one pass over the output's gradient dY, fp16 or bf16, of up to 32 ranks: reads dY and y once,
// writes G, and has the tensor cores sum P = s (g dY) B over the features and E = dY^T h over the tokens on the way,
// from the same tile in shared memory.
//
//   block:  a group of chunks of 128 features x a split of the tokens in tiles of 32
//           for each chunk: for each tile     dm, db: registers         E: registers of four warps
//                                             P: shared memory, by other warps, until the last chunk
//
// What a block has summed goes to global memory; a second small launch adds it up in its order (the same bits each
// time) and turns it into gradients. P's partial sums grow with the groups, E's with the splits: plan_adapter_backward
// weighs them.
#pragma once

#include "compose_backward.cuh"
#include "launches.cuh"
#include "mma.cuh"

namespace dora_ext {

template <typename T>
struct AdapterBackwardProblem {
  const T* grad;         // dY (tokens, out)
  const T* y;            // (tokens, out); null: no magnitude gradient
  const T* h;            // (tokens, rank), `line` numbers from token to token
  FeatureVector lora_B;  // (out, rank), likewise
  const float* gain;     // (out,)
  FeatureVector bias;    // (out,), data null for none
  T* scaled;             // G (tokens, out); null: not asked for
  float* sums;           // (splits, 2, out): sums of dY * (y - bias), sums of dY
  float* partial_E;      // (splits, out, padded rank)
  float* partial_P;      // (groups, tokens, padded rank), without s
  int64_t tokens, out;
  int rank, line;  // of this pass, and all; multiples of 8
};

struct AdapterBackwardPlan {
  int64_t chunks, groups;  // chunks of features in a group
  int64_t tiles, splits;   // tiles of tokens in a split
};

template <int KT>
struct AdapterBackwardTile {
  static constexpr int kRank = 16 * KT, kTokens = 32, kFeatures = 128, kThreads = 256, kMostTiles = 8;
  static constexpr int kStages = KT == 1 ? 4 : 3;  // so that two blocks share a multiprocessor
  static constexpr int kBytesTile = 2 * kTokens * kFeatures;
  static constexpr int kPitch = kRank + 8;  // of h's and B's rows: no bank conflicts for ldmatrix
  static constexpr int kStage = 2 * kBytesTile + 2 * kTokens * kPitch;
  static constexpr int kBytesB = 2 * kFeatures * kPitch;
  static constexpr int kBytesP = 4 * kMostTiles * kTokens * kRank;
  static constexpr int kBytesSums = kThreads / 32 * kFeatures * 2 * 4;
  static constexpr int kBytesFactors = kFeatures * 2 * 4;
  static constexpr int kSharedBytes = kStages * kStage + kBytesB + kBytesP + kBytesSums + kBytesFactors;
};

// 8 features in a row of a tile, swizzled so that ldmatrix meets no bank conflicts along tokens or features.
__device__ __forceinline__ int swizzled(int token, int pack) {
  return token * 256 + ((pack ^ (token & 7)) << 4);
}

// Only Hopper has the memory for two blocks, and so has to make do with 128 registers a thread.
template <typename T, int KT>
__global__ void __launch_bounds__(256, blocks_on_hopper(2))
    adapter_backward_kernel(AdapterBackwardProblem<T> p, AdapterBackwardPlan plan) {
  if (kBeforeAmpere) return;  // never launched there
  using Tile = AdapterBackwardTile<KT>;
  extern __shared__ __align__(128) unsigned char shared[];
  T* const b_rows = reinterpret_cast<T*>(shared + Tile::kStages * Tile::kStage);
  float* const sum_P = reinterpret_cast<float*>(shared + Tile::kStages * Tile::kStage + Tile::kBytesB);
  float* const sums = sum_P + Tile::kBytesP / 4;
  float* const factors = sums + Tile::kBytesSums / 4;  // gain, then bias, of the chunk's features
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int of_E = warp - 2 * KT;                   // the first warps sum P, the next four E
  const int pack = thread % 16, row = thread / 16;  // this thread's 8 features, and tokens row and row + 16 of a tile

  const int64_t group = blockIdx.x % plan.groups, split = blockIdx.x / plan.groups;
  const int64_t first_feature = group * plan.chunks * Tile::kFeatures, first_token = split * plan.tiles * Tile::kTokens;
  const int chunks =
      static_cast<int>(min(plan.chunks, (p.out - first_feature + Tile::kFeatures - 1) / Tile::kFeatures));
  const int tiles = static_cast<int>(min(plan.tiles, (p.tokens - first_token + Tile::kTokens - 1) / Tile::kTokens));

  int next_chunk = 0, next_tile = 0;  // to be loaded
  const auto load = [&](int stage) {
    if (next_chunk < chunks) {
      unsigned char* const to = shared + stage * Tile::kStage;
      const int64_t token0 = first_token + next_tile * Tile::kTokens;
      const int64_t feature = first_feature + next_chunk * Tile::kFeatures + pack * 8;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int t = row + 16 * u;
        const bool valid = token0 + t < p.tokens && feature < p.out;
        const int64_t at = valid ? (token0 + t) * p.out + feature : 0;
        copy16_async(to + swizzled(t, pack), p.grad + at, valid);
        if (p.y != nullptr) copy16_async(to + Tile::kBytesTile + swizzled(t, pack), p.y + at, valid);
      }
      if (thread < Tile::kTokens * Tile::kRank / 8) {
        const int t = thread / (Tile::kRank / 8), k = thread % (Tile::kRank / 8) * 8;
        const bool valid = token0 + t < p.tokens && k < p.rank;
        copy16_async(reinterpret_cast<T*>(to + 2 * Tile::kBytesTile) + t * Tile::kPitch + k,
                     p.h + (valid ? (token0 + t) * p.line + k : 0), valid);
      }
      if (++next_tile == tiles) {
        next_tile = 0;
        ++next_chunk;
      }
    }
    copy_commit();
  };
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) load(s);

  int stage = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int64_t feature0 = first_feature + chunk * Tile::kFeatures, feature = feature0 + pack * 8;
    // g B in T and the factors, which the first barrier below makes visible.
    {
      const int64_t f = feature0 + thread / 2;
      const float g = f < p.out ? p.gain[f] : 0.0f;
#pragma unroll
      for (int i = 0; i < KT; ++i) {
        const int k = (thread % 2 * KT + i) * 8;
        Pack<T, 8> values;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          values.v[j] = narrow<T>(f < p.out && k < p.rank ? g * p.lora_B.template at<float>(f * p.line + k + j) : 0.0f);
        }
        *reinterpret_cast<uint4*>(b_rows + thread / 2 * Tile::kPitch + k) = *reinterpret_cast<const uint4*>(&values);
      }
    }
    if (thread < Tile::kFeatures) {
      const int64_t f = feature0 + thread;
      factors[thread] = f < p.out ? p.gain[f] : 0.0f;
      factors[Tile::kFeatures + thread] = f < p.out && p.bias.data != nullptr ? p.bias.template at<float>(f) : 0.0f;
    }
    float product[8] = {}, total[8] = {};
    float sum_E[2][2 * KT][4] = {};

    for (int tile = 0; tile < tiles; ++tile) {
      copy_wait<Tile::kStages - 2>();
      __syncthreads();
      load((stage + Tile::kStages - 1) % Tile::kStages);
      const unsigned char* const from = shared + stage * Tile::kStage;
      const T* const h_rows = reinterpret_cast<const T*>(from + 2 * Tile::kBytesTile);
      const int64_t token0 = first_token + tile * Tile::kTokens;

      const auto gain = *reinterpret_cast<const Pack<float, 8>*>(factors + pack * 8);
      const auto bias = *reinterpret_cast<const Pack<float, 8>*>(factors + Tile::kFeatures + pack * 8);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int t = row + 16 * u;
        const auto grad = *reinterpret_cast<const Pack<T, 8>*>(from + swizzled(t, pack));
        Pack<T, 8> saved{};
        if (p.y != nullptr) saved = *reinterpret_cast<const Pack<T, 8>*>(from + Tile::kBytesTile + swizzled(t, pack));
        const Pack<T, 8> scaled = backward_step(grad, saved, gain.v, bias.v, product, total, 1);
        if (p.scaled != nullptr && token0 + t < p.tokens && feature < p.out) {
          store(p.scaled + (token0 + t) * p.out + feature, scaled);
        }
      }

      if (of_E < 0) {  // P of 16 tokens and 16 of the rank
        const int token = warp % 2 * 16, rank = warp / 2 * 16;
        float acc[2][4] = {};
        const auto place = [&](float* sum, int64_t line, int n, int half) {
          return reinterpret_cast<float2*>(sum + (line + lane / 4 + 8 * half) * Tile::kRank + rank + n * 8 +
                                           lane % 4 * 2);
        };
        if (chunk > 0) {
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float2 v = *place(sum_P, tile * Tile::kTokens + token, n, half);
              acc[n][2 * half] = v.x;
              acc[n][2 * half + 1] = v.y;
            }
          }
        }
#pragma unroll 2
        for (int k = 0; k < Tile::kFeatures / 16; ++k) {
          uint32_t a[4], b[4];
          load_matrix_x4<false>(a, from + swizzled(token + lane % 16, k * 2 + lane / 16));
          load_matrix_x4<true>(b, b_rows + (k * 16 + lane % 16) * Tile::kPitch + rank + lane / 16 * 8);
          mma_m16n8k16<T>(acc[0], a, {b[0], b[1]});
          mma_m16n8k16<T>(acc[1], a, {b[2], b[3]});
        }
        const bool last = chunk == chunks - 1;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float2 v = make_float2(acc[n][2 * half], acc[n][2 * half + 1]);
            if (!last) {
              *place(sum_P, tile * Tile::kTokens + token, n, half) = v;
            } else if (token0 + token + lane / 4 + 8 * half < p.tokens) {
              *place(p.partial_P, group * p.tokens + token0 + token, n, half) = v;
            }
          }
        }
      } else if (of_E < 4) {  // E of 32 features
#pragma unroll
        for (int k = 0; k < Tile::kTokens / 16; ++k) {
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            uint32_t a[4];
            load_matrix_x4<true>(a,
                                 from + swizzled(k * 16 + lane / 16 * 8 + lane % 8, of_E * 4 + m * 2 + lane / 8 % 2));
#pragma unroll
            for (int n = 0; n < KT; ++n) {
              uint32_t b[4];
              load_matrix_x4<true>(b, h_rows + (k * 16 + lane % 16) * Tile::kPitch + n * 16 + lane / 16 * 8);
              mma_m16n8k16<T>(sum_E[m][2 * n], a, {b[0], b[1]});
              mma_m16n8k16<T>(sum_E[m][2 * n + 1], a, {b[2], b[3]});
            }
          }
        }
      }
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }

    if (of_E >= 0 && of_E < 4) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t f = feature0 + of_E * 32 + m * 16 + lane / 4 + 8 * half;
          if (f >= p.out) continue;
#pragma unroll
          for (int n = 0; n < 2 * KT; ++n) {
            *reinterpret_cast<float2*>(p.partial_E + (split * p.out + f) * Tile::kRank + n * 8 + lane % 4 * 2) =
                make_float2(sum_E[m][n][2 * half], sum_E[m][n][2 * half + 1]);
          }
        }
      }
    }
    // Tokens row and the other half of the warp's, then the warps.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      product[i] += __shfl_xor_sync(~0u, product[i], 16);
      total[i] += __shfl_xor_sync(~0u, total[i], 16);
      if (lane < 16) {
        sums[(warp * 2) * Tile::kFeatures + pack * 8 + i] = product[i];
        sums[(warp * 2 + 1) * Tile::kFeatures + pack * 8 + i] = total[i];
      }
    }
    __syncthreads();  // also: every warp is done with this chunk's g B
    const int which = thread / Tile::kFeatures;
    const int64_t f = feature0 + thread % Tile::kFeatures;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < Tile::kThreads / 32; ++w) sum += sums[w * 2 * Tile::kFeatures + thread];
    if (f < p.out) p.sums[(split * 2 + which) * p.out + f] = sum;
  }
}

}  // namespace dora_ext
