// The norm of fp16 and bf16 weights for ranks from 16 on, on Hopper: tiles of lora_B A by wgmma, whose sums meet W in
// registers. For sm_90a; W (out, in).
//
// A block is three warpgroups: two multiply, 64 rows each of a tile of 128 x 256, and one thread of the third keeps the
// TMA fetching ahead of them, tile after tile along `in`:
//
//   lefts   lora_B's rows, in chunks of 64 ranks: they stay until the block comes to other rows
//   slots   a ring: the tile's chunks of A (64 ranks x 256 columns), then W's tile in two halves (128 x 128)
//           loaded: bytes came      freed: all eight warps have read it
//
// The warpgroups need not keep in step: while one adds up squares, the other may multiply. What a block leaves in
// `partials`: norm_high_rank.cuh.
//
// H200, bf16, us with the finish; a copy of W's bytes takes 3.2, 12.8 and 45:
//   rank                            8     16     32     64    128    384
//   2048 x 2048   here           10.8   10.6   10.5   10.1   10.3   12.6
//                 norm_rows.cuh  10.9   11.3   13.3   12.4
//   4096 x 4096   here           20.0   19.7   19.4   19.3   20.2   31.5
//                 norm_rows.cuh  19.6   20.1
//   14336 x 4096  here           46.0   44.6   44.5   44.8   46.6   78.5
//                 norm_rows.cuh  44.2   44.3
// norm_high_rank.cuh takes more than twice as long above rank 128 (H100, 14336 x 4096). Making one warpgroup run ahead
// changed nothing, nor did a ring of two tiles instead of one.
#pragma once

#include "launches.cuh"
#include "norm_high_rank.cuh"
#include "product_async.cuh"
#include "tensor_map.cuh"

namespace dora_ext {

struct HopperNormMaps {
  CUtensorMap weight, lora_A, lora_B;  // boxes of 64 x 128, 64 x 64, 64 x 128
};

struct HopperNorm {
  static constexpr int kRows = 128, kColumns = 256, kInner = 64, kThreads = 384;
  static constexpr int kLeftBytes = kRows * kInner * 2, kSlotBytes = kColumns * kInner * 2;
  static constexpr int kWeightSlots = kRows * kColumns * 2 / kSlotBytes;
  static constexpr int kBarrierBytes = 16;  // of a slot

  __host__ __device__ static int chunks(int rank) { return (rank + kInner - 1) / kInner; }
  // No more than a tile passes through: then whoever has freed the slot for a chunk of lora_B's next rows has also
  // multiplied that chunk of the rows before.
  static int slots(int rank, int64_t limit) {
    const int64_t fit = (limit - int64_t{chunks(rank)} * kLeftBytes) / (kSlotBytes + kBarrierBytes);
    return static_cast<int>(std::min<int64_t>(fit, chunks(rank) + kWeightSlots));
  }
  static int64_t shared_bytes(int rank, int slots) {
    return int64_t{chunks(rank)} * kLeftBytes + int64_t{slots} * (kSlotBytes + kBarrierBytes);
  }
};

// A block's tiles, and where its shared memory is; both sides walk the tiles and the slots in step.
struct HopperNormWalk {
  int row, column, columns;  // in tiles
  int tiles;                 // from here on
  int slots;
  uint32_t lefts, slot0, loaded0, freed0;
  int slot = 0;
  uint32_t parity = 0;
  bool new_row = true;

  __device__ __forceinline__ HopperNormWalk(int64_t out, int64_t in, int rank, int64_t tiles_per_block, int slots_,
                                            uint32_t shared)
      : columns(static_cast<int>((in + HopperNorm::kColumns - 1) / HopperNorm::kColumns)), slots(slots_) {
    const int64_t all = (out + HopperNorm::kRows - 1) / HopperNorm::kRows * columns;
    const int64_t first = blockIdx.x * tiles_per_block;
    row = static_cast<int>(first / columns);
    column = static_cast<int>(first % columns);
    tiles = static_cast<int>(all - first < tiles_per_block ? all - first : tiles_per_block);
    slot0 = shared;
    lefts = slot0 + slots * HopperNorm::kSlotBytes;
    loaded0 = lefts + HopperNorm::chunks(rank) * HopperNorm::kLeftBytes;
    freed0 = loaded0 + slots * 8;
  }

  __device__ __forceinline__ uint32_t loaded() const { return loaded0 + slot * 8; }
  __device__ __forceinline__ uint32_t freed() const { return freed0 + slot * 8; }
  __device__ __forceinline__ void next_slot() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
  // The last tile of a row of tiles in this block.
  __device__ __forceinline__ bool row_ends() const { return tiles == 1 || column + 1 == columns; }
  __device__ __forceinline__ void next_tile() {
    --tiles;
    new_row = ++column == columns;
    if (new_row) {
      column = 0;
      ++row;
    }
  }
};

// One thread.
__device__ __forceinline__ void fetch_norm_tiles(HopperNormWalk walk, const HopperNormMaps& maps, int rank) {
  using N = HopperNorm;
  for (; walk.tiles > 0; walk.next_tile()) {
    const int row = walk.row * N::kRows, column = walk.column * N::kColumns;
    for (int chunk = 0; chunk < N::chunks(rank); ++chunk, walk.next_slot()) {
      const uint32_t to = walk.slot0 + walk.slot * N::kSlotBytes, barrier = walk.loaded();
      barrier_wait(walk.freed(), walk.parity ^ 1);
      barrier_arrive_expecting(barrier, N::kSlotBytes + (walk.new_row ? N::kLeftBytes : 0));
      if (walk.new_row) load_box(walk.lefts + chunk * N::kLeftBytes, &maps.lora_B, chunk * N::kInner, row, barrier);
#pragma unroll
      for (int c = 0; c < N::kColumns; c += 64) {
        load_box(to + c * N::kInner * 2, &maps.lora_A, column + c, chunk * N::kInner, barrier);
      }
    }
    for (int half = 0; half < N::kWeightSlots; ++half, walk.next_slot()) {
      const uint32_t to = walk.slot0 + walk.slot * N::kSlotBytes, barrier = walk.loaded();
      barrier_wait(walk.freed(), walk.parity ^ 1);
      barrier_arrive_expecting(barrier, N::kSlotBytes);
#pragma unroll
      for (int c = 0; c < 128; c += 64) {
        load_box(to + c * N::kRows * 2, &maps.weight, column + half * 128 + c, row, barrier);
      }
    }
  }
}

// A warpgroup that multiplies.
template <typename T>
__device__ __forceinline__ void add_up_norm_tiles(HopperNormWalk walk, const NormProblem<T>& p, int64_t tiles_per_block,
                                                  const unsigned char* shared, int warpgroup) {
  using N = HopperNorm;
  constexpr uint64_t kLeftStep = 32 >> 4, kRightStep = 16 * 128 >> 4;
  const int lane = threadIdx.x % 32, warp_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16;
  const uint64_t left0 = describe_inner_contiguous(walk.lefts + warpgroup * 64 * N::kInner * 2);
  const uint64_t right0 = describe_rows_contiguous(walk.slot0);
  const int full = p.rank / N::kInner, rest_steps = (p.rank % N::kInner + 15) / 16;
  const auto free_slot = [&](uint32_t freed) {
    if (lane == 0) barrier_arrive_at(freed, 0);
  };

  float squares[2] = {};
  for (; walk.tiles > 0; walk.next_tile()) {
    float sums[N::kColumns / 2];
    int accumulate = 0;
    uint32_t unfinished = 0;  // the barrier of the latest slot whose products may still be under way
    const auto multiply = [&](int chunk, int step) {
      const uint64_t left = left0 + chunk * (N::kLeftBytes >> 4) + step * kLeftStep;
      multiply_k16<T, true>(sums, left, right0 + walk.slot * (N::kSlotBytes >> 4) + step * kRightStep, accumulate);
      accumulate = 1;
    };
    const auto next = [&] {
      if (unfinished != 0) free_slot(unfinished);
      unfinished = walk.freed();
      walk.next_slot();
    };
    for (int chunk = 0; chunk < full; ++chunk) {
      barrier_wait(walk.loaded(), walk.parity);
      products_begin();
#pragma unroll
      for (int step = 0; step < N::kInner / 16; ++step) multiply(chunk, step);
      products_commit();
      products_wait<1>();
      next();
    }
    if (rest_steps > 0) {
      barrier_wait(walk.loaded(), walk.parity);
      for (int step = 0; step < rest_steps; ++step) {
        products_begin();
        multiply(full, step);
        products_commit();
      }
      products_wait<0>();
      next();
    }
    products_wait<0>();
    sums_are_ready(sums);
    free_slot(unfinished);

    float tile_squares[2] = {};
#pragma unroll
    for (int half = 0; half < N::kWeightSlots; ++half) {
      const unsigned char* w_row = shared + walk.slot * N::kSlotBytes + (warp_row + lane % 16) * 128;
      barrier_wait(walk.loaded(), walk.parity);
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // 16 columns
        uint32_t w[4];
        load_matrix_x4(w, w_row + i / 4 * (64 * N::kRows * 2) + ((i % 4 * 2 + lane / 16) ^ lane % 8) * 16);
        const float* d = sums + half * 64 + i * 8;
        const float left[4] = {d[0], d[1], d[2], d[3]}, right[4] = {d[4], d[5], d[6], d[7]};
        add_squares<T>(tile_squares, w, left, right, p.scaling);
      }
      __syncwarp();
      free_slot(walk.freed());
      walk.next_slot();
    }
    squares[0] += tile_squares[0];
    squares[1] += tile_squares[1];
    if (!walk.row_ends()) continue;

    const int64_t splits = high_rank_splits(walk.columns, tiles_per_block);
    const int64_t split = blockIdx.x - static_cast<int64_t>(walk.row) * walk.columns / tiles_per_block;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = squares[i];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      squares[i] = 0.0f;
      const int64_t feature = static_cast<int64_t>(walk.row) * N::kRows + warp_row + i * 8 + lane / 4;
      if (lane % 4 != 0 || feature >= p.out) continue;
      p.partials[split * p.out + feature] = sum;
      if (walk.column + 1 < walk.columns) continue;
#pragma unroll 1
      for (int64_t empty = split + 1; empty < splits; ++empty) p.partials[empty * p.out + feature] = 0.0f;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(HopperNorm::kThreads, 1)
    norm_hopper_kernel(const __grid_constant__ HopperNormMaps maps, const NormProblem<T> p, int64_t tiles_per_block,
                       int slots) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char norm_shared[];
  if (!norm_begins(p.fingerprint)) return;
  const HopperNormWalk walk(p.out, p.in, p.rank, tiles_per_block, slots, shared_address(norm_shared));
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < slots; ++slot) {
      barrier_init(walk.loaded0 + slot * 8, 1);
      barrier_init(walk.freed0 + slot * 8, 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  // The same in all lanes, and known to be so.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= 8) {
    give_registers<40>();
    if (threadIdx.x == 256) fetch_norm_tiles(walk, maps, p.rank);
  } else {
    take_registers<232>();
    add_up_norm_tiles<T>(walk, p, tiles_per_block, norm_shared, warp / 4);
  }
#endif
}

template <typename T>
bool has_norm_hopper_kernel() {
  return has_hopper_code(norm_hopper_kernel<T>);
}

}  // namespace dora_ext
