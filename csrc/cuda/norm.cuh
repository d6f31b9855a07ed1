// norm: n = |W + s B A| per output feature. Which kernel computes it for which dtype, rank and device, and its launch.
//
//   fp16, bf16   rank <= 64   norm_rows.cuh, norm_columns.cuh   W goes from memory into registers, once
//                16 to 512    norm_hopper.cuh                   on Hopper, W (out, in): a product by wgmma
//                any          norm_high_rank.cuh                a product in chunks of the rank; also odd sizes
//   fp32, fp64                norm_fma.cuh
//   norm_cached               norm_fingerprint.cuh decides on the device whether the above has anything to do
#pragma once

#include "norm_columns.cuh"
#include "norm_common.cuh"
#include "norm_fma.cuh"
#include "norm_high_rank.cuh"
#include "norm_hopper.cuh"
#include "norm_rows.cuh"

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
  int capability;        // 90 for 9.0
};

template <typename T>
NormPlan<T> plan_norm_fma(const NormProblem<T>& p, void (*kernel)(NormProblem<T>, int64_t), int threads, int features,
                          int columns, const NormDevice& device) {
  const int64_t owned_tiles = (p.out + features - 1) / features, walked_tiles = (p.in + columns - 1) / columns;
  const Splits splits = split_walk(owned_tiles, walked_tiles, int64_t{2} * device.multiprocessors, walked_tiles);
  return {kernel, threads, 0, owned_tiles, splits.count, splits};
}

// kResident: blocks that fit on a multiprocessor by their registers.
template <typename T, typename Tile, int kResident, bool Transposed>
bool plan_low_rank(NormPlan<T>& plan, const NormProblem<T>& p, const NormDevice& device) {
  if (p.rank > Tile::kRank) return false;
  const int64_t slots = int64_t{kResident} * device.multiprocessors;
  const int64_t strips = ((Transposed ? p.out : p.in) + Tile::kBlockColumns - 1) / Tile::kBlockColumns;
  const int64_t row_tiles = ((Transposed ? p.in : p.out) + 15) / 16;
  if constexpr (Transposed) {
    const Splits splits = split_walk(strips, row_tiles, slots, row_tiles);
    plan = {norm_columns_kernel<T, Tile, kResident>, Tile::kThreads, 0, splits.count, strips, splits};
  } else {
    const Splits chunks = split_walk(strips, row_tiles, slots, kMostRowTiles);
    plan = {norm_rows_kernel<T, Tile, kResident>,
            Tile::kThreads,
            row_sums_bytes<Tile>(chunks.tiles),
            chunks.count,
            strips,
            {chunks.tiles, static_cast<int>(strips)}};
  }
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
          {per_block, splits},
          {},
          0};
  return true;
}

// The problem is aligned as far as W and A go.
template <typename T>
bool plan_hopper(NormPlan<T>& plan, const NormProblem<T>& p, const NormDevice& device) {
  using Tile = HopperNorm;
  const int slots = Tile::slots(p.rank, device.shared_bytes);
  const int64_t columns = (p.in + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t tiles = (p.out + Tile::kRows - 1) / Tile::kRows * columns;
  if (p.rank < 16) return false;  // norm_rows.cuh is as soon done
  // With fewer slots the tensor cores wait for them. The tensor maps count in int.
  if (device.capability != 90 || !has_norm_hopper_kernel<T>() || slots < 3 || p.rank % 8 != 0 || tiles == 0 ||
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
    plan = plan_norm_fma(p, norm_fma_kernel<T, Transposed>, Tile::kThreads, Tile::kFeatures, Tile::kColumns, device);
  } else {
    const auto on_16_bytes = [](const T* v) { return reinterpret_cast<uintptr_t>(v) % 16 == 0; };
    const bool aligned =
        p.pitch_A % 8 == 0 && (Transposed ? p.out : p.in) % 8 == 0 && on_16_bytes(p.weight) && on_16_bytes(p.lora_A);
    const auto low_rank = [&] {
      if (!on_16_bytes(p.lora_B) || (p.rank > 16 && p.rank % 8 != 0)) return false;
      if constexpr (Transposed) {
        return plan_low_rank<T, RowTile<1, 8, 8, 2>, 2, true>(plan, p, device) ||
               plan_low_rank<T, RowTile<2, 8, 8, 1>, 3, true>(plan, p, device) ||
               plan_low_rank<T, RowTile<4, 8, 8, 1>, 2, true>(plan, p, device);
      } else {
        return plan_low_rank<T, RowTile<1, 8, 8, 2>, 3, false>(plan, p, device) ||
               plan_low_rank<T, RowTile<2, 8, 8, 2>, 2, false>(plan, p, device) ||
               plan_low_rank<T, RowTile<4, 8, 8, 1>, 2, false>(plan, p, device);
      }
    };
    const auto plan_aligned = [&] {
      if constexpr (!Transposed) {
        if (plan_hopper<T>(plan, p, device)) return true;
      }
      return low_rank() || plan_high_rank<T, 2, 2, 4, true, Transposed>(plan, p, device) ||
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
    allow_shared(kernel, plan.shared_bytes);
    launch_beside(kernel, grid, plan.threads, plan.shared_bytes, stream, args...);
  };
  if constexpr (sizeof(T) == 2) {
    if (plan.slots > 0) {
      return launch(norm_hopper_kernel<T>, plan.maps, p, plan.splits.tiles, plan.slots);
    }
  }
  launch(plan.kernel, p, plan.splits.tiles);
}

}  // namespace dora_ext
