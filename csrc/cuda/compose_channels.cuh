// compose with the channels first, fp16 and bf16, on the tensor cores: small blocks, many at once, as in
// compose_mma.cuh. lora_B (channels, rank) is the left operand, h (rank, positions) of a sample the right one; both
// pass through shared memory in chunks of 32 ranks, base and result straight between registers and memory. H200, bf16,
// rank 16, us, here and by compose_fma.cuh: batch 16, 256 channels, 4096 positions 23, 49; 8, 640, 1024 8, 17.
#pragma once

#include <algorithm>

#include "compose_common.cuh"
#include "product_walk.cuh"

namespace dora_ext {

// 2 x 2 warps make 32 channels x 64 positions each.
struct ComposeChannelsTile {
  static constexpr int kThreads = 128, kChannels = 64, kPositions = 128, kChunk = 32;
  static constexpr int kGroups = 2;                   // of 32 positions, in a warp
  static constexpr int kRightPitch = kPositions + 8;  // no bank conflicts for ldmatrix
};

// 32 positions of a row of h are dealt: eight neighbours, of which a lane has base and result, go by twos to the places
// that the same lane has in four products of 8 columns. `pack` of eight, number `at` of its row.
template <typename T>
__device__ __forceinline__ void deal_positions(T* row, int at, const Pack<uint32_t, 4>& pack) {
  auto* const to = reinterpret_cast<uint32_t*>(row + at / 4 * 32) + at % 4;
#pragma unroll
  for (int j = 0; j < 4; ++j) to[j * 4] = pack.v[j];
}

// base, result and h start on 16 bytes and length is a multiple of 8. Three blocks run at once on a multiprocessor, one
// where more would spill: sm_75's emulated bf16 products.
template <typename T>
__global__ void __launch_bounds__(ComposeChannelsTile::kThreads, kBeforeAmpere ? 1 : 3)
    compose_channels_kernel(ComposeProblem<T> p, int channel_tiles, int position_tiles) {
  using Tile = ComposeChannelsTile;
  constexpr int G = Tile::kGroups;
  __shared__ __align__(16) T left[Tile::kChannels * Tile::kChunk];
  __shared__ __align__(16) T right[Tile::kChunk * Tile::kRightPitch];

  const int position0 = static_cast<int>(blockIdx.x % position_tiles) * Tile::kPositions;
  const int channel0 = static_cast<int>(blockIdx.x / position_tiles % channel_tiles) * Tile::kChannels;
  const int64_t sample = blockIdx.x / position_tiles / channel_tiles;
  const int lane = threadIdx.x % 32, warp_channel = threadIdx.x / 32 % 2 * 32;
  const int warp_position = threadIdx.x / 32 / 2 * 32 * G;
  const int lane_channel = channel0 + warp_channel + lane / 4;
  const int lane_position = position0 + warp_position + lane % 4 * 8;
  const int64_t lane_at = (sample * p.out + lane_channel) * p.length + lane_position;
  const auto inside = [&](int channel, int position) { return channel < p.out && position < p.length; };

  // Under way while the products are formed: 16 bytes each of four channels and G groups of 32 positions.
  Pack<uint32_t, 4> base[2][2][G];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = lane_channel + m * 16 + half * 8;
#pragma unroll
      for (int group = 0; group < G; ++group) {
        const int position = lane_position + group * 32;
        base[m][half][group] = {};
        if (inside(channel, position)) {
          const T* from = p.base + lane_at + (m * 16 + half * 8) * p.length + group * 32;
          base[m][half][group] = *reinterpret_cast<const Pack<uint32_t, 4>*>(from);
        }
      }
    }
  }

  const bool B_aligned = p.rank % 8 == 0 && on_16_bytes(p.lora_B);
  const int left_lane = chunk_at(warp_channel + lane % 16, lane / 16);
  float sums[2][G][4][4] = {};  // [16 channels][32 positions][product]
  for (int rank0 = 0; rank0 < p.rank; rank0 += Tile::kChunk) {
    if (rank0 > 0) __syncthreads();
    const int halves = p.rank - rank0 > 16 ? 2 : 1;
    load_rank_chunk<Tile::kThreads, Tile::kChannels, false>(left, p.lora_B, channel0, p.out, p.rank, rank0, halves == 1,
                                                            B_aligned);
    copy_commit();
#pragma unroll 2
    for (int e = threadIdx.x; e < Tile::kChunk * Tile::kPositions / 8; e += Tile::kThreads) {
      const int k = e / (Tile::kPositions / 8), at = e % (Tile::kPositions / 8);
      const int position = position0 + at * 8;
      Pack<uint32_t, 4> pack{};
      if (rank0 + k < p.rank && position < p.length) {
        const T* from = p.h + (sample * p.rank + rank0 + k) * p.length + position;
        pack = *reinterpret_cast<const Pack<uint32_t, 4>*>(from);
      }
      deal_positions(right + k * Tile::kRightPitch, at, pack);
    }
    copy_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int half = 0; half < halves; ++half) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrix_x4(a[m], left + (left_lane ^ half * 16) + m * 16 * Tile::kChunk);
      }
#pragma unroll
      for (int j = 0; j < 4 * G; j += 2) {
        uint32_t b[4];
        const int column = warp_position + j * 8 + lane / 16 * 8;
        load_matrix_x4<true>(b, right + (half * 16 + lane % 16) * Tile::kRightPitch + column);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k16<T>(sums[m][j / 4][j % 4], a[m], {b[0], b[1]});
          mma_m16n8k16<T>(sums[m][j / 4][j % 4 + 1], a[m], {b[2], b[3]});
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = lane_channel + m * 16 + half * 8;
      const ComposeFactors<float> factors = compose_factors(p, channel);
#pragma unroll
      for (int group = 0; group < G; ++group) {
        const int position = lane_position + group * 32;
        Pack<uint32_t, 4>& pack = base[m][half][group];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 v = unpack<T>(pack.v[j]);
          const float* hB = &sums[m][group][j][half * 2];
          pack.v[j] = dora_ext::pack<T>(factors.apply(v.x, hB[0]), factors.apply(v.y, hB[1]));
        }
        if (!inside(channel, position)) continue;
        T* to = p.result + lane_at + (m * 16 + half * 8) * p.length + group * 32;
        store(reinterpret_cast<uint32_t*>(to), pack);
      }
    }
  }
}

template <typename T>
bool compose_channels_fits(const ComposeProblem<T>& p) {
  return p.length % 8 == 0 && std::max(p.out, p.length) <= INT32_MAX - 128 && on_16_bytes(p.base) &&
         on_16_bytes(p.result) && on_16_bytes(p.h);
}

template <typename T>
void launch_compose_channels(const ComposeProblem<T>& p, cudaStream_t stream) {
  using Tile = ComposeChannelsTile;
  const auto channel_tiles = static_cast<int>(ceil_div<int64_t>(p.out, Tile::kChannels));
  const auto position_tiles = static_cast<int>(ceil_div<int64_t>(p.length, Tile::kPositions));
  const auto blocks = static_cast<unsigned>(p.batch * channel_tiles * position_tiles);
  compose_channels_kernel<T><<<blocks, Tile::kThreads, 0, stream>>>(p, channel_tiles, position_tiles);
}

}  // namespace dora_ext
