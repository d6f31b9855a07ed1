// What the warpgroups of adapter_backward_hopper.cuh do: its tile, the walk over tokens and features, and the four
// roles.
#pragma once

#include "adapter_backward_kernel.cuh"
#include "product_tiles.cuh"

namespace dora_ext {

struct AdapterBackwardMaps {
  CUtensorMap grad, y, h;  // boxes of 64 x 64
};

// kRanks: 16, 32 or 64, no less than the rank.
template <int kRanks_>
struct HopperAdapterTile {
  static constexpr int kRanks = kRanks_, kTokens = 64, kHalf = 128, kHalves = 2, kFeatures = kHalves * kHalf;
  static constexpr int kThreads = 128 * (kHalves + 2);
  static constexpr int kBoxBytes = 64 * 64 * 2;
  static constexpr int kSavedAt = 2 * kBoxBytes, kHiddenAt = 4 * kBoxBytes, kSlotBytes = 5 * kBoxBytes;  // in a slot
  static constexpr int kSlots = 4, kFactorAt = kSlots * kSlotBytes;                                      // g B
  static constexpr int kSumsAt = kFactorAt + kFeatures / 64 * kBoxBytes, kSumsBytes = 4 * 2 * kHalf * 4;
  static constexpr int kBarriersAt = kSumsAt + kHalves * kSumsBytes;  // of slots, loaded and freed
  static constexpr int kSharedBytes = kBarriersAt + kSlots * 2 * 8;
  static_assert(kSharedBytes <= 227 * 1024, "what a block can have");
};

struct HopperAdapterPlan {
  int64_t tiles, groups;  // tiles of tokens; groups of features
  int64_t share, splits;  // tiles of a block; the most blocks that share a group
};

// A block's tiles, group by group.
struct AdapterWalk {
  int tiles, group, tile, left;

  __device__ __forceinline__ explicit AdapterWalk(const HopperAdapterPlan& plan) : tiles(static_cast<int>(plan.tiles)) {
    const int64_t first = blockIdx.x * plan.share, all = plan.groups * plan.tiles;
    group = static_cast<int>(first / plan.tiles);
    tile = static_cast<int>(first % plan.tiles);
    left = static_cast<int>(min(plan.share, all - first));
  }
  __device__ __forceinline__ bool group_ends() const { return left == 1 || tile + 1 == tiles; }
  __device__ __forceinline__ void advance() {
    --left;
    if (++tile == tiles) {
      tile = 0;
      ++group;
    }
  }
};

// One thread.
template <typename Tile, typename T>
__device__ __forceinline__ void fetch_gradients(AdapterWalk walk, const AdapterBackwardMaps& maps,
                                                const AdapterBackwardProblem<T>& p, uint32_t shared) {
  const uint32_t loaded = shared + Tile::kBarriersAt, freed = loaded + Tile::kSlots * 8;
  RingPlace<Tile::kSlots> place;
  for (; walk.left > 0; walk.advance()) {
    const int token = walk.tile * Tile::kTokens;
    for (int half = 0; half < Tile::kHalves; ++half, place.advance()) {
      const uint32_t to = shared + place.stage * Tile::kSlotBytes, barrier = loaded + place.stage * 8;
      const int feature = walk.group * Tile::kFeatures + half * Tile::kHalf;
      barrier_wait(freed + place.stage * 8, place.parity ^ 1);
      barrier_arrive_expecting(barrier, (p.y != nullptr ? 5 : 3) * Tile::kBoxBytes);
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        load_box(to + box * Tile::kBoxBytes, &maps.grad, feature + box * 64, token, barrier);
        if (p.y != nullptr) {
          load_box(to + Tile::kSavedAt + box * Tile::kBoxBytes, &maps.y, feature + box * 64, token, barrier);
        }
      }
      load_box(to + Tile::kHiddenAt, &maps.h, 0, token, barrier);
    }
  }
}

// What such a warpgroup has summed when it leaves a group: E from its registers, the sums through `scratch`.
template <typename Tile, typename T>
__device__ __forceinline__ void leave_group(const AdapterWalk& walk, const AdapterBackwardProblem<T>& p,
                                            const HopperAdapterPlan& plan,
                                            float (&E)[Tile::kHalf / 64][Tile::kRanks / 2], float (&product)[8],
                                            float (&total)[8], float* scratch, int half) {
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, pack = thread % 16;
  const int64_t feature0 = int64_t{walk.group} * Tile::kFeatures + half * Tile::kHalf;
  const int64_t split = blockIdx.x - walk.group * plan.tiles / plan.share;
  const int64_t end = walk.tile + 1 == walk.tiles ? plan.splits : split + 1;  // with the zeros behind
#pragma unroll
  for (int box = 0; box < Tile::kHalf / 64; ++box) {
    sums_are_ready(E[box]);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t f = feature0 + box * 64 + warp * 16 + lane / 4 + 8 * below;
      if (f >= p.out) continue;
#pragma unroll
      for (int j = 0; j < Tile::kRanks / 8; ++j) {
        const int64_t k = j * 8 + lane % 4 * 2;
        float2 v = make_float2(E[box][j * 4 + below * 2], E[box][j * 4 + below * 2 + 1]);
        for (int64_t s = split; s < end; ++s, v = {}) {
          *reinterpret_cast<float2*>(p.partial_E + (s * p.out + f) * Tile::kRanks + k) = v;
        }
      }
    }
  }
  // Of tokens side by side in a warp, then of the warps.
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    product[i] += __shfl_xor_sync(~0u, product[i], 16);
    total[i] += __shfl_xor_sync(~0u, total[i], 16);
    if (lane < 16) {
      scratch[warp * 2 * Tile::kHalf + pack * 8 + i] = product[i];
      scratch[(warp * 2 + 1) * Tile::kHalf + pack * 8 + i] = total[i];
    }
    product[i] = total[i] = 0;
  }
  warpgroup_sync(1 + half);
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int64_t f = feature0 + thread;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) sum += scratch[(w * 2 + which) * Tile::kHalf + thread];
    if (f >= p.out) continue;
    for (int64_t s = split; s < end; ++s, sum = 0) p.sums[(s * 2 + which) * p.out + f] = sum;
  }
  warpgroup_sync(1 + half);
}

// A warpgroup: G, the sums and E of half a group's features.
template <typename Tile, typename T>
__device__ __forceinline__ void sum_over_tokens(AdapterWalk walk, const AdapterBackwardProblem<T>& p,
                                                const HopperAdapterPlan& plan, unsigned char* shared, uint32_t address,
                                                int half) {
  constexpr int kBoxes = Tile::kHalf / 64;
  const int thread = threadIdx.x % 128;
  const int pack = thread % 16, row = thread / 16;  // this thread's 8 features, and every 8th token of a tile
  const uint32_t loaded = address + Tile::kBarriersAt, freed = loaded + Tile::kSlots * 8;
  const int at_pack = pack / 8 * Tile::kBoxBytes + row * 128 + ((pack % 8) ^ row) * 16;  // swizzled by the TMA
  float* const scratch = reinterpret_cast<float*>(shared + Tile::kSumsAt + half * Tile::kSumsBytes);

  RingPlace<Tile::kSlots> place;
  for (int i = 0; i < half; ++i) place.advance();
  float E[kBoxes][Tile::kRanks / 2], product[8] = {}, total[8] = {};
  Pack<float, 8> gain{}, bias{};
  int accumulate = 0;
  for (; walk.left > 0; walk.advance()) {
    const int64_t feature0 = int64_t{walk.group} * Tile::kFeatures + half * Tile::kHalf, feature = feature0 + pack * 8;
    if (accumulate == 0 && feature < p.out) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        gain.v[i] = p.gain[feature + i];
        bias.v[i] = p.bias.data != nullptr ? p.bias.template at<float>(feature + i) : 0.0f;
      }
    }
    const unsigned char* const from = shared + place.stage * Tile::kSlotBytes + at_pack;
    const uint32_t slot = address + place.stage * Tile::kSlotBytes;
    barrier_wait(loaded + place.stage * 8, place.parity);
    products_begin();
#pragma unroll
    for (int step = 0; step < Tile::kTokens / 16; ++step) {
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        multiply_k16<T, true, true>(E[box], describe_rows_contiguous(slot + box * Tile::kBoxBytes) + step * (2048 >> 4),
                                    describe_rows_contiguous(slot + Tile::kHiddenAt) + step * (2048 >> 4),
                                    step > 0 ? 1 : accumulate);
      }
    }
    products_commit();
    accumulate = 1;
#pragma unroll 4
    for (int i = 0; i < Tile::kTokens / 8; ++i) {
      const int64_t token = int64_t{walk.tile} * Tile::kTokens + i * 8 + row;
      const auto grad = *reinterpret_cast<const Pack<T, 8>*>(from + i * 1024);
      Pack<T, 8> saved{};
      if (p.y != nullptr) saved = *reinterpret_cast<const Pack<T, 8>*>(from + Tile::kSavedAt + i * 1024);
      const Pack<T, 8> scaled = backward_step(grad, saved, gain.v, bias.v, product, total, 1);
      if (p.scaled != nullptr && token < p.tokens && feature < p.out) store(p.scaled + token * p.out + feature, scaled);
    }
    products_wait<0>();
    __syncwarp();
    if (thread % 32 == 0) barrier_arrive(freed + place.stage * 8);
    for (int i = 0; i < Tile::kHalves; ++i) place.advance();
    if (!walk.group_ends()) continue;

    leave_group<Tile>(walk, p, plan, E, product, total, scratch, half);
    accumulate = 0;
  }
}

// A warpgroup: g B of a group's features, as wgmma reads it: (feature, rank), in boxes of 64 x 64.
template <typename Tile, typename T>
__device__ __forceinline__ void stage_factor(const AdapterBackwardProblem<T>& p, int64_t feature0, unsigned char* to) {
  constexpr int kPacks = Tile::kRanks / 8;
#pragma unroll 4
  for (int i = threadIdx.x % 128; i < Tile::kFeatures * kPacks; i += 128) {
    const int row = i / kPacks, k = i % kPacks;
    const int64_t feature = feature0 + row;
    Pack<T, 8> values{};
    if (feature < p.out && k * 8 < p.rank) {
      const float g = p.gain[feature];
      const int64_t from = feature * p.line + k * 8;
      const auto scale = [&](const auto& b) {
#pragma unroll
        for (int j = 0; j < 8; ++j) values.v[j] = narrow<T>(g * widen(b.v[j]));
      };
      if (p.lora_B.dtype == Dtype::kFloat) {
        scale(*reinterpret_cast<const Pack<float, 8>*>(static_cast<const float*>(p.lora_B.data) + from));
      } else {
        scale(*reinterpret_cast<const Pack<T, 8>*>(static_cast<const T*>(p.lora_B.data) + from));
      }
    }
    *reinterpret_cast<Pack<T, 8>*>(to + row / 64 * Tile::kBoxBytes + row % 64 * 128 + (k ^ row % 8) * 16) = values;
  }
}

// A warpgroup: P of each tile.
template <typename Tile, typename T>
__device__ __forceinline__ void sum_over_features(AdapterWalk walk, const AdapterBackwardProblem<T>& p,
                                                  unsigned char* shared, uint32_t address) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const uint32_t loaded = address + Tile::kBarriersAt, freed = loaded + Tile::kSlots * 8;
  const uint64_t factor = describe_rows_contiguous(address + Tile::kFactorAt);
  const auto free_slot = [&](int slot) {
    if (lane == 0) barrier_arrive(freed + slot * 8);
  };
  RingPlace<Tile::kSlots> place;
  int of_group = -1;
  for (; walk.left > 0; walk.advance()) {
    if (walk.group != of_group) {
      warpgroup_sync(1 + Tile::kHalves);  // what multiplied the last one has ended
      stage_factor<Tile>(p, int64_t{walk.group} * Tile::kFeatures, shared + Tile::kFactorAt);
      stores_before_tma();
      warpgroup_sync(1 + Tile::kHalves);
      of_group = walk.group;
    }
    float P[Tile::kRanks / 2];
    int unfinished = -1;
#pragma unroll
    for (int half = 0; half < Tile::kHalves; ++half) {
      const uint64_t grad = describe_inner_contiguous(address + place.stage * Tile::kSlotBytes);
      barrier_wait(loaded + place.stage * 8, place.parity);
      products_begin();
#pragma unroll
      for (int step = 0; step < Tile::kHalf / 16; ++step) {
        multiply_k16<T, true>(P, grad + step / 4 * (Tile::kBoxBytes >> 4) + step % 4 * (32 >> 4),
                              factor + (half * Tile::kHalf / 16 + step) * (2048 >> 4), half > 0 || step > 0);
      }
      products_commit();
      products_wait<1>();
      if (unfinished >= 0) free_slot(unfinished);
      unfinished = place.stage;
      place.advance();
    }
    products_wait<0>();
    free_slot(unfinished);
    sums_are_ready(P);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t token = int64_t{walk.tile} * Tile::kTokens + warp * 16 + lane / 4 + 8 * below;
      if (token >= p.tokens) continue;
      float* const to = p.partial_P + (walk.group * p.tokens + token) * Tile::kRanks + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < Tile::kRanks / 8; ++j) {
        *reinterpret_cast<float2*>(to + j * 8) = make_float2(P[j * 4 + below * 2], P[j * 4 + below * 2 + 1]);
      }
    }
  }
}

}  // namespace dora_ext
