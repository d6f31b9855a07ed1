// adapter_backward: how the work is split, the second launch that adds up what the blocks have summed, and the
// launchers. The pass itself: adapter_backward_kernel.cuh; on Hopper adapter_backward_hopper.cuh, whose sums the same
// second launch adds up.
#pragma once

#include <algorithm>

#include "adapter_backward_kernel.cuh"

namespace dora_ext {

// Sums `count` arrays (lines, padded), factor(line) times that goes to `to` (lines, rank), `pitch` numbers from line to
// line. Four numbers a thread.
template <typename Out, typename Factor>
__device__ __forceinline__ void finish_partials(const float* partials, int64_t count, int64_t lines, int padded,
                                                int rank, int pitch, int64_t block, Factor&& factor, Out* to) {
  const int64_t at = (block * blockDim.x + threadIdx.x) * 4, line = at / padded;
  const int k = static_cast<int>(at % padded);
  if (line >= lines || k >= rank) return;
  float4 sum{};
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) {
    const float4 v = *reinterpret_cast<const float4*>(partials + i * lines * padded + at);
    sum.x += v.x;
    sum.y += v.y;
    sum.z += v.z;
    sum.w += v.w;
  }
  const float f = factor(line);
  *reinterpret_cast<Pack<Out, 4>*>(to + line * pitch + k) = {narrow<Out>(f * sum.x), narrow<Out>(f * sum.y),
                                                             narrow<Out>(f * sum.z), narrow<Out>(f * sum.w)};
}

// P (tokens, rank) = s * sum of partial_P; grad_B (out, rank) = s g * sum of partial_E, both of this pass's ranks;
// grad_magnitude and grad_bias. What is launched beside it finds G there, which the launch before made.
template <typename T, typename TB, int KT>
__global__ void __launch_bounds__(256, 4)
    adapter_backward_finish_kernel(AdapterBackwardProblem<T> p, AdapterBackwardPlan plan, float scaling, T* P,
                                   TB* grad_B, ComposeBackwardFinish<float> features, int64_t blocks_P,
                                   int64_t blocks_B) {
  constexpr int kPadded = AdapterBackwardTile<KT>::kRank;
  wait_for_previous_launch();
  allow_next_launch();
  const int64_t block = blockIdx.x;
  if (block < blocks_P) {
    finish_partials(
        p.partial_P, plan.groups, p.tokens, kPadded, p.rank, p.line, block, [&](int64_t) { return scaling; }, P);
  } else if (block < blocks_P + blocks_B) {
    finish_partials(
        p.partial_E, plan.splits, p.out, kPadded, p.rank, p.line, block - blocks_P,
        [&](int64_t feature) { return scaling * p.gain[feature]; }, grad_B);
  } else {
    features.run(block - blocks_P - blocks_B);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// The split that is expected to be done first, in bytes that a block moves: of its tiles, what a chunk and a block cost
// besides (about 1 and 2 us), and the partial sums, which are written and read again.
template <int KT>
AdapterBackwardPlan plan_adapter_backward(int64_t tokens, int64_t out, int multiprocessors, int shared_of_each) {
  using Tile = AdapterBackwardTile<KT>;
  constexpr double kTileBytes = 3 * Tile::kBytesTile, kChunkBytes = 10e3, kBlockBytes = 20e3;
  constexpr int kReserved = 1024;  // by the driver, for each block
  const int64_t slots = int64_t{multiprocessors} * std::clamp(shared_of_each / (Tile::kSharedBytes + kReserved), 1, 2);
  const int64_t all_chunks = ceil_div<int64_t>(out, Tile::kFeatures),
                all_tiles = ceil_div<int64_t>(tokens, Tile::kTokens);
  AdapterBackwardPlan best{};
  double least = 0;
  for (int64_t tiles = 1; tiles <= Tile::kMostTiles; ++tiles) {
    for (int64_t chunks = 1; chunks <= std::min<int64_t>(all_chunks, 32); ++chunks) {
      const int64_t groups = ceil_div(all_chunks, chunks), splits = ceil_div(all_tiles, tiles);
      const double partial = 8.0 * Tile::kRank * static_cast<double>(groups * tokens + splits * out);
      const double cost =
          static_cast<double>(ceil_div(groups * splits, slots)) *
              (static_cast<double>(chunks) * (static_cast<double>(tiles) * kTileBytes + kChunkBytes) + kBlockBytes) +
          partial / static_cast<double>(slots);
      if (best.groups == 0 || cost < least) {
        best = {chunks, groups, tiles, splits};
        least = cost;
      }
    }
  }
  return best;
}

template <typename T, int KT>
void launch_adapter_backward(const AdapterBackwardProblem<T>& p, const AdapterBackwardPlan& plan, cudaStream_t stream) {
  using Tile = AdapterBackwardTile<KT>;
  const auto kernel = adapter_backward_kernel<T, KT>;
  allow_shared(kernel, Tile::kSharedBytes);
  kernel<<<static_cast<unsigned>(plan.groups * plan.splits), Tile::kThreads, Tile::kSharedBytes, stream>>>(p, plan);
}

// features: also grad_magnitude and grad_bias.
template <typename T, int KT, typename TB>
void launch_adapter_backward_finish(const AdapterBackwardProblem<T>& p, const AdapterBackwardPlan& plan, float scaling,
                                    const float* norm, T* P, TB* grad_B, bool features, FeatureResult grad_magnitude,
                                    float* grad_bias, cudaStream_t stream) {
  constexpr int kPadded = AdapterBackwardTile<KT>::kRank, kThreads = 256;
  const ComposeBackwardFinish<float> finish{p.sums,       plan.splits,    p.out,
                                            norm,         p.gain,         /*saved_is_output=*/true,
                                            /*factor=*/1, grad_magnitude, grad_bias};
  const auto blocks = [](int64_t lines) { return ceil_div<int64_t>(lines * kPadded, kThreads * 4); };
  const int64_t blocks_P = blocks(p.tokens), blocks_B = blocks(p.out);
  const int64_t all =
      blocks_P + blocks_B + (features ? ceil_div<int64_t>(p.out, ComposeBackwardFinish<float>::kFeatures) : 0);
  launch_beside(adapter_backward_finish_kernel<T, TB, KT>, static_cast<unsigned>(all), kThreads, 0, stream, p, plan,
                scaling, P, grad_B, finish, blocks_P, blocks_B);
}

}  // namespace dora_ext
