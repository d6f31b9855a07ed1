// adapter_backward in one pass over the output's gradient dY and the output y, fp16 or bf16, of up to 64 ranks; for
// sm_90a. The sums of adapter_backward_kernel.cuh: P = s (g dY) B over the features, E = dY^T h over the tokens, those
// of dY (y - bias) and of dY; and G. Both products are wgmma's, out of the tiles that the TMA brought.
//
// A block walks down the tokens of a group of 256 features, 64 at a time, and may go on in the next group:
//
//   slots        a ring of halves of a tile: 64 tokens x 128 features of dY and y, and these tokens' h
//   warpgroup 0  G, the sums and E of the first half's features, which stay in its registers until the group ends
//             1  of the second half's
//             2  P of the tile's tokens over the group's features; g B lies in shared memory
//             3  one thread keeps the TMA fetching
//
// What a block has summed goes to global memory, as in adapter_backward.cuh, whose second launch adds it up: P for each
// group; E and the sums for each block that has had tokens of the group, and zeros for as many more as a group may
// have.
//
// H200, bf16, us with the finish, writing G and without, at rank 16, 32 and 64:
//   tokens, out    here                                  adapter_backward_kernel.cuh
//   4096, 4096     37, 42, 53         30, 34, 45         38, 43, 83         33, 39, 79
//   4096, 14336    111, 125, 160      79, 91, 123        110, 130, 257      91, 118, 245
//   16384, 4096    118, 131, 159      83, 94, 120        125, 147, 294      104, 134, 282
//   4096, 1024     13, 15, 21         13, 14, 20         15, 17, 34         15, 19, 33
// At the rate of a copy dY, y and G would take 26, 91 and 104 of the first three, dY and y 17, 61 and 69; what rank 64
// takes beyond rank 16 is P's partial sums, which go to memory and back. Adding them up in clusters of two blocks first
// took 154 us for 159 (4096, 14336, rank 64), and 119 for 111 at rank 16; clusters of four do not fill the GPU, and
// took 230.
#pragma once

#include "adapter_backward_roles.cuh"
#include "tensor_map.cuh"

namespace dora_ext {

template <typename T, int kRanks>
__global__ void __launch_bounds__(HopperAdapterTile<kRanks>::kThreads, 1)
    adapter_backward_hopper_kernel(const __grid_constant__ AdapterBackwardMaps maps, const AdapterBackwardProblem<T> p,
                                   const HopperAdapterPlan plan) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = HopperAdapterTile<kRanks>;
  extern __shared__ __align__(1024) unsigned char adapter_shared[];
  const uint32_t address = shared_address(adapter_shared);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Tile::kSlots; ++slot) {
      barrier_init(address + Tile::kBarriersAt + slot * 8, 1);
      barrier_init(address + Tile::kBarriersAt + (Tile::kSlots + slot) * 8, 8);  // warps of two warpgroups
    }
    barrier_init_fence();
  }
  __syncthreads();
  const AdapterWalk walk(plan);
  // The same in all lanes, and known to be so.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup < Tile::kHalves) {
    take_registers<184>();
    sum_over_tokens<Tile>(walk, p, plan, adapter_shared, address, warpgroup);
  } else if (warpgroup == Tile::kHalves) {
    give_registers<104>();
    sum_over_features<Tile>(walk, p, adapter_shared, address);
  } else {
    give_registers<40>();
    if (threadIdx.x % 128 == 0) fetch_gradients<Tile>(walk, maps, p, address);
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Launcher

template <int kRanks>
HopperAdapterPlan plan_adapter_backward_hopper(int64_t tokens, int64_t out, int multiprocessors) {
  using Tile = HopperAdapterTile<kRanks>;
  HopperAdapterPlan plan{};
  plan.tiles = ceil_div<int64_t>(tokens, Tile::kTokens);
  plan.groups = ceil_div<int64_t>(out, Tile::kFeatures);
  plan.share = ceil_div<int64_t>(plan.groups * plan.tiles, multiprocessors);
  const bool same = plan.tiles % plan.share == 0 || plan.share % plan.tiles == 0;  // groups are shared alike
  plan.splits = ceil_div(same ? plan.tiles : plan.tiles - 1, plan.share) + (same ? 0 : 1);
  return plan;
}

// False where the driver describes no such matrices.
template <typename T, int kRanks>
bool launch_adapter_backward_hopper(const AdapterBackwardProblem<T>& p, const HopperAdapterPlan& plan,
                                    cudaStream_t stream) {
  using Tile = HopperAdapterTile<kRanks>;
  AdapterBackwardMaps maps{};
  if (!encode_map<T>(&maps.grad, {p.grad, p.out, p.tokens, p.out}, Tile::kTokens) ||
      !encode_map<T>(&maps.y, {p.y != nullptr ? p.y : p.grad, p.out, p.tokens, p.out}, Tile::kTokens) ||
      !encode_map<T>(&maps.h, {p.h, p.rank, p.tokens, p.line}, Tile::kTokens)) {
    return false;
  }
  const auto kernel = adapter_backward_hopper_kernel<T, kRanks>;
  allow_shared(kernel, Tile::kSharedBytes);
  const auto blocks = static_cast<unsigned>(ceil_div(plan.groups * plan.tiles, plan.share));
  kernel<<<blocks, Tile::kThreads, Tile::kSharedBytes, stream>>>(maps, p, plan);
  return true;
}

}  // namespace dora_ext
