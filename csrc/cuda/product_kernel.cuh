// The kernel of product.cuh, for sm_90a.
//
// A block is three warpgroups: two multiply, 64 rows each of a tile of 128 x kColumns, and one thread of the third
// keeps the TMA fetching ahead of them into a ring of stages, each 64 k of both operands:
//
//   memory --TMA--> stage 0 | 1 | 2 | 3 --wgmma--> sums in registers --> scale, bias, round --> shared --TMA--> memory
//                   loaded: bytes came      freed: all eight warps of all blocks of the cluster have read it
//
// The blocks of a cluster have tiles above one another and share `right`: each fetches its part of the stage for all of
// them. Blocks stay and take tile after tile; while the sums of one go out, the next one's stages are fetched.
//
// A cluster takes the next tile when it is free, so that clusters which start late, because another kernel (NCCL's,
// say) holds their multiprocessors, leave theirs to the others. Or the tiles are dealt out beforehand: see
// ProductProblem.
#pragma once

#include "product_last.cuh"
#include "product_norms.cuh"

namespace dora_ext {

// One thread: asks for all stages of all tiles. The full ones of both parts come first, then the two rests, which the
// other side multiplies in fewer steps. In the first block of a cluster it also takes the tiles: `next` is the first.
template <typename Tile, bool RightTransposed, typename First>
__device__ __forceinline__ void fetch_tiles(const ProductMaps& maps, const ProductProblem& p, const First& f,
                                            uint32_t shared, uint32_t loaded, uint32_t freed, uint32_t next) {
  constexpr uint16_t kEveryBlock = (1 << Tile::kCluster) - 1;
  const int part = static_cast<int>(cluster_rank()) * Tile::kPartOfRight;
  RingPlace<Tile::kStages> place;
  TileWalk<Tile> tile(p, shared);
  const bool takes = p.counters != nullptr && cluster_rank() == 0;
  [[maybe_unused]] bool ready = false;  // all that is made first
  const auto fetch = [&](const CUtensorMap* left, const CUtensorMap* right, int k) {
    const uint32_t stage = shared + place.stage * Tile::kStageBytes, barrier = loaded + place.stage * 8;
    barrier_wait(freed + place.stage * 8, place.parity ^ 1);
    barrier_arrive_expecting(barrier, Tile::kStageBytes);
    load_box(stage, left, k, tile.row, barrier);
    const auto load_right = [&](int first, int x, int y) {
      const uint32_t dst = stage + Tile::kLeftBytes + first * Tile::kInner * 2;
      load_box_to(kEveryBlock, dst, right, x, y, barrier);
    };
    if constexpr (RightTransposed) {
#pragma unroll
      for (int c = 0; c < Tile::kPartOfRight; c += 64) load_right(part + c, tile.column + part + c, k);
    } else {
      load_right(part, k, tile.column + part);
    }
    place.advance();
  };
  if (takes) tile.tell(next);
  while (tile.advance()) {
    if (takes) next = atomicAdd(p.counters, 1);  // the answer comes while the stages are asked for
    if constexpr (First::kAny) {
      if (tile.stretch >= 0) {
        fetch_stretch(f, tile, maps, p, place, shared, loaded, freed);
        if (takes) tile.tell(next);
        continue;
      }
    }
    const int inner_full = p.inner & ~(Tile::kInner - 1), tail_full = p.tail & ~(Tile::kInner - 1);
    for (int k = 0; k < inner_full; k += Tile::kInner) fetch(&maps.left, &maps.right, k);
    wait_for_previous_launch();
    if constexpr (First::kAny) ready = ready || await_stretch(f, tile);
    for (int k = 0; k < tail_full; k += Tile::kInner) fetch(&maps.left_tail, &maps.right_tail, k);
    if (inner_full < p.inner) fetch(&maps.left, &maps.right, inner_full);
    if (tail_full < p.tail) fetch(&maps.left_tail, &maps.right_tail, tail_full);
    if (takes) tile.tell(next);
  }
  if (takes) {
    __threadfence();
    if (atomicAdd(p.counters + 1, 1) + 1 == gridDim.x / Tile::kCluster) p.counters[0] = p.counters[1] = 0;
  }
}

// gain and bias of a thread's columns in a box of 64: two in every eight. kGainMade: by this kernel itself.
template <bool kGainMade>
struct ColumnFactors {
  float2 gain[8], bias[8];

  // Asks for one column's to be near when they are read, one thread for each column of a tile.
  static __device__ __forceinline__ void prefetch(const ProductProblem& p, int column) {
    if (column >= p.columns) return;
    if (p.gain != nullptr) prefetch_to_l1(p.gain + column);
    if (p.bias != nullptr) prefetch_to_l1(p.bias + column);
  }

  __device__ __forceinline__ void load(const ProductProblem& p, int column) {
    load(gain, p.gain, column, p.columns, 1.0f);
    load(bias, p.bias, column, p.columns, 0.0f);
  }

  // Beside the last column any number will do: what becomes of it is never stored.
  static __device__ __forceinline__ void load(float2 (&to)[8], const float* from, int column, int columns,
                                              float without) {
    const auto* here = reinterpret_cast<const float2*>(from + column);
    const bool whole = column + 7 * 8 < columns;
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = make_float2(without, without);
    if (from == nullptr) return;
    if (whole) {
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j] = kGainMade ? __ldca(here + 4 * j) : __ldg(here + 4 * j);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (column + 8 * j < columns) to[j] = kGainMade ? __ldca(here + 4 * j) : __ldg(here + 4 * j);
      }
    }
  }

  __device__ __forceinline__ float2 apply(int j, float low, float high) const {
    return make_float2(fmaf(low, gain[j].x, bias[j].x), fmaf(high, gain[j].y, bias[j].y));
  }
};

// None.
struct NoFactors {
  static __device__ __forceinline__ void prefetch(const ProductProblem&, int) {}
  __device__ __forceinline__ void load(const ProductProblem&, int) {}
  __device__ __forceinline__ float2 apply(int, float low, float high) const { return make_float2(low, high); }
};
template <typename First>
using FactorsOf = std::conditional_t<First::kFactors, ColumnFactors<First::kGainMade>, NoFactors>;

// One warpgroup: its 64 rows of the tile, box by box, through shared memory.
template <typename T, typename Tile, typename Factors>
__device__ __forceinline__ void store_sums(const float (&sums)[Tile::kColumns / 2], Factors& factors,
                                           const ProductMaps& maps, const ProductProblem& p, int row, int column,
                                           uint32_t boxes, int warpgroup) {
  const int lane = threadIdx.x % 32;
  const uint32_t to_row = (threadIdx.x % 128 / 32 * 16 + lane % 16) * 128;
#pragma unroll
  for (int box = 0; box < Tile::kColumns / 64; ++box) {
    const uint32_t to = boxes + box % 2 * Tile::kBoxBytes;
    uint32_t rounded[8][2];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* d = sums + box * 32 + j * 4;
      const float2 above = factors.apply(j, d[0], d[1]), below = factors.apply(j, d[2], d[3]);
      rounded[j][0] = pack<T>(above.x, above.y);
      rounded[j][1] = pack<T>(below.x, below.y);
    }
    if (box + 1 < Tile::kColumns / 64) factors.load(p, column + (box + 1) * 64 + lane % 4 * 2);
    // The box that was here two boxes ago must have left; those of the tile before have, in all likelihood.
    if (box != 1) {
      if (threadIdx.x % 128 == 0) box == 0 ? stored_boxes_read<0>() : stored_boxes_read<1>();
      warpgroup_sync(1 + warpgroup);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      store_matrix_x4(to + to_row + ((j + lane / 16) ^ lane % 8) * 16,
                      {rounded[j][0], rounded[j][1], rounded[j + 1][0], rounded[j + 1][1]});
    }
    stores_before_tma();
    warpgroup_sync(1 + warpgroup);
    if (threadIdx.x % 128 == 0) store_box(&maps.result, to, column + box * 64, row);
  }
}

// A warpgroup that multiplies.
template <typename T, typename Tile, bool RightTransposed, typename First>
__device__ __forceinline__ void multiply_tiles(const ProductMaps& maps, const ProductProblem& p, const First& f,
                                               uint32_t shared, uint32_t loaded, uint32_t freed, int warpgroup) {
  constexpr uint64_t kLeftStep = 32 >> 4, kRightStep = (RightTransposed ? 16 * 128 : 32) >> 4;
  const int lane = threadIdx.x % 32;
  const uint64_t left0 = describe_inner_contiguous(shared + warpgroup * 64 * Tile::kInner * 2);
  const uint64_t right0 = RightTransposed ? describe_rows_contiguous(shared + Tile::kLeftBytes)
                                          : describe_inner_contiguous(shared + Tile::kLeftBytes);
  const int full = p.inner / Tile::kInner + p.tail / Tile::kInner;
  const int rest_steps[2] = {(p.inner % Tile::kInner + 15) / 16, (p.tail % Tile::kInner + 15) / 16};

  RingPlace<Tile::kStages> place;
  TileWalk<Tile> tile(p, shared);
  const auto free_stage = [&](int stage) {
    if (stage >= 0 && lane < Tile::kCluster) barrier_arrive_at(freed + stage * 8, lane);
  };
  while (tile.advance()) {
    float sums[Tile::kColumns / 2];
    if constexpr (First::kAny) {
      if (tile.stretch >= 0) {
        make_stretch(f, tile, p, place, shared, loaded, freed, warpgroup, sums);
        continue;
      }
    }
    FactorsOf<First>::prefetch(p, tile.column + static_cast<int>(threadIdx.x) % 256);
    int accumulate = 0, unfinished = -1;  // the latest stage whose products may still be under way
    const auto multiply = [&](int step) {
      const uint64_t at = static_cast<uint64_t>(place.stage * (Tile::kStageBytes >> 4));
      multiply_k16<T, RightTransposed>(sums, left0 + at + step * kLeftStep, right0 + at + step * kRightStep,
                                       accumulate);
      accumulate = 1;
    };
    for (int i = 0; i < full; ++i) {
      barrier_wait(loaded + place.stage * 8, place.parity);
      products_begin();
#pragma unroll
      for (int step = 0; step < Tile::kInner / 16; ++step) multiply(step);
      products_commit();
      products_wait<1>();
      free_stage(unfinished);
      unfinished = place.stage;
      place.advance();
    }
    for (int i = 0; i < 2; ++i) {
      if (rest_steps[i] == 0) continue;
      barrier_wait(loaded + place.stage * 8, place.parity);
      for (int step = 0; step < rest_steps[i]; ++step) {
        products_begin();
        multiply(step);
        products_commit();
      }
      products_wait<1>();
      free_stage(unfinished);
      unfinished = place.stage;
      place.advance();
    }
    const int row = tile.row + warpgroup * 64;
    FactorsOf<First> factors;
    wait_for_previous_launch();
    factors.load(p, tile.column + lane % 4 * 2);
    products_wait<0>();
    sums_are_ready(sums);
    free_stage(unfinished);
    store_sums<T, Tile>(sums, factors, maps, p, row, tile.column,
                        shared + Tile::kResultAt + warpgroup * 2 * Tile::kBoxBytes, warpgroup);
  }
  if (threadIdx.x % 128 == 0) stored_boxes_read<0>();
}

template <typename T, typename Tile, bool RightTransposed, typename First>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    product_kernel(const __grid_constant__ ProductMaps maps, const __grid_constant__ ProductProblem p,
                   const __grid_constant__ First f) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char product_shared[];
  const uint32_t shared = shared_address(product_shared);
  const uint32_t loaded = shared + Tile::kBarriersAt, freed = loaded + Tile::kStages * 8;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(loaded + stage * 8, 1);
      barrier_init(freed + stage * 8, 8 * Tile::kCluster);
    }
    for (int slot = 0; slot < Tile::kNumbers; ++slot) barrier_init(shared + Tile::kNumbersAt + slot * 8, 1);
    barrier_init_fence();
  }
  uint32_t first = 0;
  if (threadIdx.x == 256 && p.counters != nullptr && cluster_rank() == 0) first = atomicAdd(p.counters, 1);
  cluster_sync();
  // The same in all lanes, and known to be so.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= 8) {
    give_registers<40>();
    if (threadIdx.x == 256) {
      prefetch_map(&maps.left);
      prefetch_map(&maps.right);
      fetch_tiles<Tile, RightTransposed>(maps, p, f, shared, loaded, freed, first);
    }
  } else {
    take_registers<232>();
    multiply_tiles<T, Tile, RightTransposed>(maps, p, f, shared, loaded, freed, warp / 4);
  }
  // No block leaves while another may still reach into its shared memory.
  __syncwarp();
  cluster_sync();
  if constexpr (First::kAny) {
    if (warp == 0 && cluster_rank() == 0) leave_stretches(f, gridDim.x / Tile::kCluster);
  }
#endif
}

}  // namespace dora_ext
