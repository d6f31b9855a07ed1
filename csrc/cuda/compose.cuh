// compose: the pass over a layer's output. Which kernel does it, and where the rest of the story is.
//
//   features last    fp16, bf16   rank > 96, aligned   compose_high_rank.cuh
//                                 any                  compose_mma.cuh      channels_last is the same memory
//                    fp32, fp64   compose_fma.cuh
//   channels first   fp16, bf16   aligned              compose_channels.cuh
//                    every dtype  compose_fma.cuh
//   backward         compose_backward.cuh
//   dm of features whose gain is too small to find u again from the output: recover.cuh
#pragma once

#include "compose_channels.cuh"
#include "compose_fma.cuh"
#include "compose_high_rank.cuh"
#include "compose_mma.cuh"

namespace dora_ext {

template <typename T>
bool plan_compose_high_rank(const ComposeProblem<T>& p, cudaStream_t stream) {
  if (p.rank <= 96 || p.out % 8 != 0 || !on_16_bytes(p.base) || !on_16_bytes(p.result)) return false;
  int device = 0, major = 0, multiprocessors = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major < 8) return false;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return launch_compose_high_rank(p, multiprocessors, shared, stream);
}

template <typename T>
void launch_compose_features_last(const ComposeProblem<T>& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.out == 0) return;
  if constexpr (sizeof(T) == 2) {
    if (!plan_compose_high_rank(p, stream)) launch_compose_mma(p, stream);
  } else {
    launch_compose_fma<false>(p, stream);
  }
}

template <typename T>
void launch_compose_channels_first(const ComposeProblem<T>& p, cudaStream_t stream) {
  if (p.batch == 0 || p.length == 0 || p.out == 0) return;
  if constexpr (sizeof(T) == 2) {
    if (compose_channels_fits(p)) {
      launch_compose_channels(p, stream);
    } else {
      launch_compose_fma_tiles<true, false>(p, p.out, p.length, stream);
    }
  } else {
    launch_compose_fma<true>(p, stream);
  }
}

}  // namespace dora_ext
