// compose with the features last, fp16 and bf16, bound by memory: small blocks, many at once, so that some load while
// others compute or store. h and lora_B pass through shared memory in chunks of 32 ranks, base and result straight
// between registers and memory. Serves every rank and alignment; compose_high_rank.cuh is faster where ranks are high.
#pragma once

#include "compose_common.cuh"
#include "launches.cuh"
#include "product_walk.cuh"

namespace dora_ext {

// 2 x 2 warps make 32 tokens x 64 features each. Of larger and smaller tiles none was faster by more than 1 %.
struct ComposeTile {
  static constexpr int kThreads = 128;
  static constexpr int kTokens = 64, kFeatures = 128, kGroups = 2;  // of 32 features, in a warp
  static constexpr int kChunk = 32, kStages = 3;
  static constexpr int kLeft = kTokens * kChunk;
  static constexpr int kStage = kLeft + kFeatures * kChunk;  // h's rows, then lora_B's, dealt

  // At least one, because the kernel's first barrier is a chunk's.
  __host__ __device__ static int chunks(int rank) { return rank > kChunk ? ceil_div(rank, kChunk) : 1; }
  static int64_t shared_bytes(int rank) {
    return int64_t{2} * kStage * (chunks(rank) < kStages ? chunks(rank) : kStages);
  }
};

// Aligned: base and result start on 16 bytes and out is a multiple of 8. Four blocks run at once on a
// multiprocessor, one where more would spill: element-wise access, and sm_75's emulated bf16 products.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(ComposeTile::kThreads, Aligned && !kBeforeAmpere ? 4 : 1)
    compose_mma_kernel(ComposeProblem<T> p, int64_t feature_tiles) {
  using Tile = ComposeTile;
  constexpr int G = Tile::kGroups;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ __align__(16) float factors[4][Tile::kFeatures];  // ComposeFactors
  T* shared = reinterpret_cast<T*>(shared_bytes);

  const int64_t token0 = blockIdx.x / feature_tiles * Tile::kTokens;
  const int64_t feature0 = blockIdx.x % feature_tiles * Tile::kFeatures;
  const int lane = threadIdx.x % 32, warp_token = threadIdx.x / 32 % 2 * 32;
  const int warp_feature = threadIdx.x / 32 / 2 * 32 * G;
  const int64_t lane_token = token0 + warp_token + lane / 4;
  const int64_t lane_feature = feature0 + warp_feature + lane % 4 * 8;

  const int chunks = Tile::chunks(p.rank);
  const bool h_aligned = p.rank % 8 == 0 && reinterpret_cast<uintptr_t>(p.h) % 16 == 0;
  const bool B_aligned = p.rank % 8 == 0 && reinterpret_cast<uintptr_t>(p.lora_B) % 16 == 0;
  const auto load_chunk = [&](int chunk) {
    if (chunk < chunks) {
      T* stage = shared + chunk % Tile::kStages * Tile::kStage;
      const int rank0 = chunk * Tile::kChunk;
      const bool half = p.rank - rank0 <= 16;
      load_rank_chunk<Tile::kThreads, Tile::kTokens, false>(stage, p.h, token0, p.tokens, p.rank, rank0, half,
                                                            h_aligned);
      load_rank_chunk<Tile::kThreads, Tile::kFeatures, true>(stage + Tile::kLeft, p.lora_B, feature0, p.out, p.rank,
                                                             rank0, half, B_aligned);
    }
    copy_commit();
  };
#pragma unroll
  for (int chunk = 0; chunk < Tile::kStages - 1; ++chunk) load_chunk(chunk);

  // Under way while the products are formed: 16 bytes each of four tokens and G groups of 32 features.
  Pack<uint32_t, 4> base[2][2][G];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = lane_token + m * 16 + half * 8;
      const int64_t row = token >= p.tokens ? -1 : p.rows == nullptr ? token : p.rows[token];
#pragma unroll
      for (int group = 0; group < G; ++group) {
        const int64_t feature = lane_feature + group * 32;
        const T* from = p.base + (row < 0 ? 0 : row * p.out + feature);
        Pack<uint32_t, 4>& to = base[m][half][group];
        if constexpr (Aligned) {
          // All ones: NaN in both dtypes.
          if (row >= 0 && feature < p.out) {
            to = *reinterpret_cast<const Pack<uint32_t, 4>*>(from);
          } else {
            to = {{~0u, ~0u, ~0u, ~0u}};
          }
        } else {
          __align__(16) T numbers[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) numbers[i] = row >= 0 && feature + i < p.out ? from[i] : narrow<T>(nanf(""));
          to = *reinterpret_cast<const Pack<uint32_t, 4>*>(numbers);
        }
      }
    }
  }
  static_assert(Tile::kFeatures <= Tile::kThreads, "a thread has one feature's factors");
  if (threadIdx.x < Tile::kFeatures) {
    const ComposeFactors<float> f = compose_factors(p, feature0 + threadIdx.x);
    factors[0][threadIdx.x] = f.value;
    factors[1][threadIdx.x] = f.product;
    factors[2][threadIdx.x] = f.before;
    factors[3][threadIdx.x] = f.after;
  }

  const int h_lane = chunk_at(warp_token + lane % 16, lane / 16);
  const int B_lane = chunk_at(warp_feature + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  float sums[2][G][4][4] = {};  // [16 tokens][32 features][product]
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_wait<Tile::kStages - 2>();
    __syncthreads();  // all see this chunk; and all have left the one before, whose stage is filled next
    load_chunk(chunk + Tile::kStages - 1);
    const T* stage = shared + chunk % Tile::kStages * Tile::kStage;
    const int halves = p.rank - chunk * Tile::kChunk > 16 ? 2 : 1;
    for (int half = 0; half < halves; ++half) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrix_x4(a[m], stage + (h_lane ^ half * 16) + m * 16 * Tile::kChunk);
#pragma unroll
      for (int j = 0; j < 4 * G; j += 2) {
        uint32_t b[4];
        load_matrix_x4(b, stage + Tile::kLeft + (B_lane ^ half * 16) + j * 8 * Tile::kChunk);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k16<T>(sums[m][j / 4][j % 4], a[m], {b[0], b[1]});
          mma_m16n8k16<T>(sums[m][j / 4][j % 4 + 1], a[m], {b[2], b[3]});
        }
      }
    }
  }

#pragma unroll
  for (int group = 0; group < G; ++group) {
    // Two features at a time, so that few factors take up registers; the results take base's place.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 f[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f[i] = *reinterpret_cast<const float2*>(&factors[i][warp_feature + group * 32 + lane % 4 * 8 + 2 * j]);
      }
      const ComposeFactors<float> left{f[0].x, f[1].x, f[2].x, f[3].x}, right{f[0].y, f[1].y, f[2].y, f[3].y};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 v = unpack<T>(base[m][half][group].v[j]);
          const float* hB = &sums[m][group][j][half * 2];
          base[m][half][group].v[j] = pack<T>(left.apply(v.x, hB[0]), right.apply(v.y, hB[1]));
        }
      }
    }
    const int64_t feature = lane_feature + group * 32;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = lane_token + m * 16 + half * 8;
        if (token >= p.tokens || feature >= p.out) continue;
        T* to = p.result + token * p.out + feature;
        if constexpr (Aligned) {
          store(reinterpret_cast<uint32_t*>(to), base[m][half][group]);
        } else {
          const T* numbers = reinterpret_cast<const T*>(base[m][half][group].v);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (feature + i < p.out) to[i] = numbers[i];
          }
        }
      }
    }
  }
}

template <typename T>
void launch_compose_mma(const ComposeProblem<T>& p, cudaStream_t stream) {
  using Tile = ComposeTile;
  const bool aligned = p.out % 8 == 0 && on_16_bytes(p.base) && on_16_bytes(p.result);
  const auto kernel = aligned ? compose_mma_kernel<T, true> : compose_mma_kernel<T, false>;
  const int64_t feature_tiles = ceil_div<int64_t>(p.out, Tile::kFeatures);
  const int64_t blocks = ceil_div<int64_t>(p.tokens, Tile::kTokens) * feature_tiles;
  const int64_t shared_bytes = Tile::shared_bytes(p.rank);
  allow_shared(kernel, shared_bytes);
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, shared_bytes, stream>>>(p, feature_tiles);
}

}  // namespace dora_ext
