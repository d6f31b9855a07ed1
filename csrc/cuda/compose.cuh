// compose: the pass over a layer's output. Which kernel does it, and where the rest of the story is.
//
//   features last    fp16, bf16   compose_mma.cuh        channels_last convolutions are the same memory
//                    fp32, fp64   compose_fma.cuh
//   channels first   every dtype  compose_fma.cuh
//   backward         compose_backward.cuh
//   dm of features whose gain is too small to find u again from the output: compose_recover.cuh
#pragma once

#include "compose_fma.cuh"
#include "compose_mma.cuh"

namespace dora_ext {

template <typename T>
void launch_compose_features_last(const ComposeProblem<T>& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.out == 0) return;
  if constexpr (sizeof(T) == 2) {
    launch_compose_mma(p, stream);
  } else {
    launch_compose_fma<false>(p, stream);
  }
}

template <typename T>
void launch_compose_channels_first(const ComposeProblem<T>& p, cudaStream_t stream) {
  if (p.batch == 0 || p.length == 0 || p.out == 0) return;
  launch_compose_fma<true>(p, stream);
}

}  // namespace dora_ext
