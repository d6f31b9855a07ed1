// compose with the features last, fp16 and bf16: a block of 8 warps makes 128 tokens x 128 features, h B^T on the
// tensor cores, h and lora_B through shared memory in chunks of 32 ranks, base and result straight between registers
// and memory.
//
// mma leaves a lane two neighbouring columns of every 8. To give it eight neighbouring features instead (16 bytes), the
// features of a group of 32 are dealt to four products so: column i of product j is feature (i / 2) * 8 + j * 2 + i
// % 2. Lane t of a quad then holds features 8 t ... 8 t + 7 of the group in its products 0 ... 3, and a quad covers 64
// bytes of one token. The deal is made when lora_B's rows are put into shared memory.
#pragma once

#include "compose_common.cuh"
#include "mma.cuh"

namespace dora_ext {

struct ComposeTile {
  static constexpr int kTokens = 128, kFeatures = 128, kThreads = 256;
  static constexpr int kRanks = 32;          // a chunk
  static constexpr int kPitch = kRanks + 8;  // rows 80 bytes apart: ldmatrix meets no bank conflict
  static constexpr int kOperand = 128 * kPitch;
  static constexpr int kStage = 2 * kOperand;  // h's rows, then lora_B's
  static constexpr int kStages = 3;

  // At least one, because the kernel's first barrier is a chunk's.
  __host__ __device__ static int chunks(int rank) { return rank > kRanks ? ceil_div(rank, kRanks) : 1; }
  static int64_t shared_bytes(int rank) {
    return int64_t{2} * kStage * (chunks(rank) < kStages ? chunks(rank) : kStages);
  }
};

// Where feature f of a tile lies in shared memory: product by product, columns in their order.
__device__ __forceinline__ int dealt_row(int f) {
  return (f & ~31) | (f >> 1 & 3) << 3 | (f >> 3 & 3) << 1 | (f & 1);
}

// 128 rows of src (rows, rank) from row0 on, 32 ranks from rank0 on (16 if there are no more), zeros outside.
template <bool Dealt, typename T>
__device__ __forceinline__ void stage_operand(T* dst, const T* src, int64_t row0, int64_t rows, int rank, int rank0,
                                              bool aligned) {
  const int shift = rank - rank0 > 16 ? 2 : 1;
  for (int c = threadIdx.x; c < 128 << shift; c += ComposeTile::kThreads) {
    const int row = c >> shift, k = (c & ((1 << shift) - 1)) * 8;
    const bool valid = row0 + row < rows && rank0 + k < rank;
    const T* from = src + (valid ? (row0 + row) * rank + rank0 + k : 0);
    T* to = dst + (Dealt ? dealt_row(row) : row) * ComposeTile::kPitch + k;
    if (aligned) {
      copy16_async(to, from, valid);
    } else {
      __align__(16) T numbers[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) numbers[i] = valid && rank0 + k + i < rank ? from[i] : narrow<T>(0.0f);
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(numbers);
    }
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kBeforeAmpere = true;
#else
constexpr bool kBeforeAmpere = false;
#endif

// Aligned: base and result start on 16 bytes and out is a multiple of 8. Two blocks run at once on a multiprocessor,
// one where two would spill: element-wise access, and sm_75's emulated bf16 products.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(ComposeTile::kThreads, Aligned && !kBeforeAmpere ? 2 : 1)
    compose_mma_kernel(ComposeProblem<T> p, int64_t feature_tiles) {
  using Tile = ComposeTile;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ __align__(16) float factors[4][Tile::kFeatures];  // ComposeFactors
  T* shared = reinterpret_cast<T*>(shared_bytes);

  const int64_t token0 = blockIdx.x / feature_tiles * Tile::kTokens;
  const int64_t feature0 = blockIdx.x % feature_tiles * Tile::kFeatures;
  // A warp makes 32 tokens x 64 features.
  const int lane = threadIdx.x % 32, warp_token = threadIdx.x / 32 % 4 * 32, warp_feature = threadIdx.x / 128 * 64;
  const int64_t lane_token = token0 + warp_token + lane / 4;
  const int64_t lane_feature = feature0 + warp_feature + lane % 4 * 8;

  const int chunks = Tile::chunks(p.rank);
  const bool h_aligned = p.rank % 8 == 0 && reinterpret_cast<uintptr_t>(p.h) % 16 == 0;
  const bool B_aligned = p.rank % 8 == 0 && reinterpret_cast<uintptr_t>(p.lora_B) % 16 == 0;
  const auto load_chunk = [&](int chunk) {
    if (chunk < chunks) {
      T* stage = shared + chunk % Tile::kStages * Tile::kStage;
      stage_operand<false>(stage, p.h, token0, p.tokens, p.rank, chunk * Tile::kRanks, h_aligned);
      stage_operand<true>(stage + Tile::kOperand, p.lora_B, feature0, p.out, p.rank, chunk * Tile::kRanks, B_aligned);
    }
    copy_commit();
  };
#pragma unroll
  for (int chunk = 0; chunk < Tile::kStages - 1; ++chunk) load_chunk(chunk);

  // Under way while the products are formed: 16 bytes each of four tokens and two groups of 32 features.
  Pack<uint32_t, 4> base[2][2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = lane_token + m * 16 + half * 8;
      const int64_t row = token >= p.tokens ? -1 : p.rows == nullptr ? token : p.rows[token];
#pragma unroll
      for (int group = 0; group < 2; ++group) {
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
  if (threadIdx.x < Tile::kFeatures) {
    const ComposeFactors<float> f = compose_factors(p, feature0 + threadIdx.x);
    factors[0][threadIdx.x] = f.value;
    factors[1][threadIdx.x] = f.product;
    factors[2][threadIdx.x] = f.before;
    factors[3][threadIdx.x] = f.after;
  }

  float sums[2][2][4][4] = {};  // [16 tokens][32 features][product]
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_wait<Tile::kStages - 2>();
    __syncthreads();  // all see this chunk; and all have left the one before, whose stage is filled next
    load_chunk(chunk + Tile::kStages - 1);
    const T* h_rows = shared + chunk % Tile::kStages * Tile::kStage + warp_token * Tile::kPitch;
    const T* B_rows = shared + chunk % Tile::kStages * Tile::kStage + Tile::kOperand + warp_feature * Tile::kPitch;
    const int steps = p.rank - chunk * Tile::kRanks > 16 ? 2 : 1;
    for (int step = 0; step < steps; ++step) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrix_x4(a[m], h_rows + (m * 16 + lane % 16) * Tile::kPitch + step * 16 + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];
        load_matrix_x4(b, B_rows + (j * 8 + lane / 16 * 8 + lane % 8) * Tile::kPitch + step * 16 + lane / 8 % 2 * 8);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k16<T>(sums[m][j / 4][j % 4], a[m], {b[0], b[1]});
          mma_m16n8k16<T>(sums[m][j / 4][j % 4 + 1], a[m], {b[2], b[3]});
        }
      }
    }
  }

#pragma unroll
  for (int group = 0; group < 2; ++group) {
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
  const bool aligned = p.out % 8 == 0 && on_16_bytes(p.base) && on_16_bytes(p.result);
  const auto kernel = aligned ? compose_mma_kernel<T, true> : compose_mma_kernel<T, false>;
  const int64_t feature_tiles = ceil_div<int64_t>(p.out, ComposeTile::kFeatures);
  const int64_t blocks = ceil_div<int64_t>(p.tokens, ComposeTile::kTokens) * feature_tiles;
  const int64_t shared_bytes = ComposeTile::shared_bytes(p.rank);
  if (shared_bytes + 2048 > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  kernel<<<static_cast<unsigned>(blocks), ComposeTile::kThreads, shared_bytes, stream>>>(p, feature_tiles);
}

}  // namespace dora_ext
