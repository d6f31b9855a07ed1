// norm: n = |W + s B A| per output feature. Which kernel computes it for which dtype, rank and device, and its launch.
//
//   fp16, bf16   rank <= 64   norm_low_rank.cuh    W streams once past lora_B in registers
//                to 512       norm_hopper.cuh      on Hopper, W (out, in): the same by wgmma
//                any          norm_high_rank.cuh   a product in chunks of the rank; also odd sizes and small devices
//   fp32, fp64                norm_fma.cuh
//   norm_cached               norm_fingerprint.cuh decides on the device whether the above has anything to do
#pragma once

#include "norm_common.cuh"
#include "norm_fma.cuh"
#include "norm_high_rank.cuh"
#include "norm_hopper.cuh"
#include "norm_low_rank.cuh"

namespace dora_ext {

template <typename T>
struct NormPlan {
  void (*kernel)(NormProblem<T>, int64_t tiles_per_split);
  int threads;
  int64_t shared_bytes;
  int64_t blocks_x, blocks_y;
  Splits splits;  // tiles per block, and rows of partials
  // Instead of `kernel`, where slots > 0.
  HopperNormMaps maps;
  int slots;
};

struct NormDevice {
  int multiprocessors;
  int64_t shared_bytes;  // that one block can have
  int capability;        // the major number
};

// `resident`: blocks of this kernel that fit on a multiprocessor by their registers.
template <typename T>
NormPlan<T> make_norm_plan(const NormProblem<T>& p, void (*kernel)(NormProblem<T>, int64_t), int threads,
                           int64_t shared_bytes, int features, int columns, int resident, const NormDevice& device) {
  if (shared_bytes > 0) resident = std::min<int64_t>(resident, device.shared_bytes / shared_bytes);
  const int64_t owned_tiles = (p.out + features - 1) / features;
  const Splits splits =
      split_walk(owned_tiles, (p.in + columns - 1) / columns, int64_t{device.multiprocessors} * resident);
  return {kernel, threads, shared_bytes, owned_tiles, splits.count, splits};
}

template <typename T, int KT, int WM, int WN, bool Transposed>
bool plan_low_rank(NormPlan<T>& plan, const NormProblem<T>& p, const NormDevice& device) {
  using Tile = LowRankTile<KT, WM, WN, Transposed>;
  if (p.rank > Tile::kRank || Tile::kSharedBytes > device.shared_bytes) return false;
  plan = make_norm_plan(p, norm_low_rank_kernel<T, KT, WM, WN, Transposed>, Tile::kThreads, Tile::kSharedBytes,
                        Tile::kFeatures, Tile::kColumns, 2, device);
  return true;
}

// Every block walks the same number of tiles, whichever rows they are of.
template <typename T, int WM, int WN, int NT, bool Aligned, bool Transposed>
bool plan_high_rank(NormPlan<T>& plan, const NormProblem<T>& p, const NormDevice& device) {
  constexpr int kBlocks = kHighRankBlocks<NT>;
  using Tile = WalkTile<WM, WN, NT>;
  constexpr int64_t kScratch = 4096;  // static, and what the driver takes
  // Blocks that share a multiprocessor share its memory, unless that leaves them too little.
  WalkMemory memory = walk_memory<Tile>(Tile::chunks(p.rank), device.shared_bytes / kBlocks - kScratch);
  if (memory.besides == 0) memory = walk_memory<Tile>(Tile::chunks(p.rank), device.shared_bytes - kScratch);
  if (memory.besides == 0) return false;
  const int64_t resident = std::min<int64_t>(kBlocks, device.shared_bytes / memory.bytes);
  const int64_t columns = (p.in + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t tiles = (p.out + Tile::kRows - 1) / Tile::kRows * columns;
  const int64_t slots = device.multiprocessors * resident;
  const int64_t per_block = std::max<int64_t>(1, (tiles + slots - 1) / slots);
  const int splits = tiles > 0 ? static_cast<int>(high_rank_splits(columns, per_block)) : 0;
  plan = {norm_high_rank_kernel<T, WM, WN, NT, Aligned, Transposed>,
          Tile::kThreads,
          memory.bytes,
          (tiles + per_block - 1) / per_block,
          1,
          {per_block, splits}};
  return true;
}

// The problem is aligned as far as W and A go.
template <typename T>
bool plan_hopper(NormPlan<T>& plan, const NormProblem<T>& p, const NormDevice& device) {
  using Tile = HopperNorm;
  const int slots = Tile::slots(p.rank, device.shared_bytes);
  const int64_t columns = (p.in + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t tiles = (p.out + Tile::kRows - 1) / Tile::kRows * columns;
  // With fewer slots the tensor cores wait for them. The tensor maps count in int.
  if (device.capability != 9 || slots < 3 || p.rank % 8 != 0 || tiles == 0 ||
      reinterpret_cast<uintptr_t>(p.lora_B) % 16 != 0 || std::max(p.in, p.out) > INT32_MAX - 512) {
    return false;
  }
  HopperNormMaps maps;
  if (!encode_map<T>(&maps.weight, {p.weight, p.in, p.out, p.in}, Tile::kRows) ||
      !encode_map<T>(&maps.lora_A, {p.lora_A, p.in, p.rank, p.pitch_A}, Tile::kInner) ||
      !encode_map<T>(&maps.lora_B, {p.lora_B, p.rank, p.out, p.rank}, Tile::kRows)) {
    return false;
  }
  const int64_t per_block = (tiles + device.multiprocessors - 1) / device.multiprocessors;
  plan = {nullptr,
          Tile::kThreads,
          Tile::shared_bytes(p.rank, slots),
          (tiles + per_block - 1) / per_block,
          1,
          {per_block, static_cast<int>(high_rank_splits(columns, per_block))},
          maps,
          slots};
  return true;
}

// The first that fits. p.partials may still be null: its size comes from the plan.
template <typename T, bool Transposed>
NormPlan<T> plan_norm(const NormProblem<T>& p, const NormDevice& device) {
  NormPlan<T> plan{};
  if constexpr (sizeof(T) >= 4) {
    using Tile = FmaTile<Transposed>;
    plan = make_norm_plan(p, norm_fma_kernel<T, Transposed>, Tile::kThreads, 0, Tile::kFeatures, Tile::kColumns, 2,
                          device);
  } else {
    const auto on_16_bytes = [](const T* v) { return reinterpret_cast<uintptr_t>(v) % 16 == 0; };
    const bool aligned =
        p.pitch_A % 8 == 0 && (Transposed ? p.out : p.in) % 8 == 0 && on_16_bytes(p.weight) && on_16_bytes(p.lora_A);
    // Rows of memory of at least 256 bytes a tile: 64 features of 128 columns, or turned around.
    constexpr int kM = Transposed ? 2 : 1, kN = Transposed ? 4 : 8;
    const auto plan_aligned = [&] {
      if (plan_low_rank<T, 1, kM, kN, Transposed>(plan, p, device)) return true;
      if (plan_low_rank<T, 2, kM, kN, Transposed>(plan, p, device)) return true;
      if (plan_low_rank<T, 4, 2, 4, Transposed>(plan, p, device)) return true;
      if constexpr (!Transposed) {
        if (plan_hopper<T>(plan, p, device)) return true;
      }
      return plan_high_rank<T, 2, 2, 4, true, Transposed>(plan, p, device) ||
             plan_high_rank<T, 1, 4, 1, true, Transposed>(plan, p, device);
    };
    if (!aligned || !plan_aligned()) plan_high_rank<T, 1, 4, 1, false, Transposed>(plan, p, device);
  }
  return plan;
}

template <typename T>
void launch_norm(const NormPlan<T>& plan, const NormProblem<T>& p, cudaStream_t stream) {
  if (plan.splits.count == 0) return;  // in = 0: the finishing kernel adds up nothing
  const dim3 grid(static_cast<unsigned>(plan.blocks_x), static_cast<unsigned>(plan.blocks_y));
  const auto launch = [&](auto* kernel, const auto&... args) {
    if (plan.shared_bytes > 0) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
    }
    kernel<<<grid, plan.threads, plan.shared_bytes, stream>>>(args...);
  };
  if constexpr (sizeof(T) == 2) {
    if (plan.slots > 0) {
      return launch(norm_hopper_kernel<T>, plan.maps, p, plan.splits.tiles, plan.slots);
    }
  }
  launch(plan.kernel, p, plan.splits.tiles);
}

}  // namespace dora_ext
