// result = gain * ([left | left_tail] [right | right_tail]^T) + bias, fp16 or bf16, on the tensor cores of Hopper: sums
// in fp32, rounded once. Here: its launch. The kernel: product_kernel.cuh; how tiles are chosen: product_choice.h.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../product_choice.h"
#include "launches.cuh"
#include "product_kernel.cuh"
#include "tensor_map.cuh"

namespace dora_ext {

// The matrices as they lie: left and left_tail x = k; right and right_tail x = k, or columns if `right_transposed`.
// Tails are looked at where p.tail > 0.
struct ProductMatrices {
  HalfMatrix left, right, left_tail, right_tail, result;
};

inline bool has_product_kernel() {
  return has_hopper_code(product_kernel<__half, HopperTile<128>, false, NothingFirst>);
}

template <typename T, typename Tile, bool RightTransposed, typename First>
cudaError_t launch_clusters(const ProductMaps& maps, const ProductProblem& p, const First& first, int64_t clusters,
                            cudaStream_t stream, bool beside) {
  const auto kernel = product_kernel<T, Tile, RightTransposed, First>;
  allow_shared(kernel, Tile::kSharedBytes);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = Tile::kCluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * Tile::kCluster));
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = Tile::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = beside ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, maps, p, first);
}

// beside: set up, and begun, beside the launch before this one. left, right and what is made first were there before
// that was launched; what may be its doing are tails, gain, bias, and a fingerprint.
template <typename T, typename Tile, bool RightTransposed, typename First>
cudaError_t launch_product_tiles(const ProductMatrices& m, const ProductProblem& p, const First& first,
                                 int multiprocessors, cudaStream_t stream, bool beside) {
  constexpr int kRightHeight = RightTransposed ? 64 : Tile::kPartOfRight;
  ProductMaps maps{};
  if (!encode_map<T>(&maps.left, m.left, Tile::kRows) || !encode_map<T>(&maps.right, m.right, kRightHeight) ||
      !encode_map<T>(&maps.result, m.result, 64) ||
      (p.tail > 0 && (!encode_map<T>(&maps.left_tail, m.left_tail, Tile::kRows) ||
                      !encode_map<T>(&maps.right_tail, m.right_tail, kRightHeight)))) {
    return cudaErrorInvalidValue;
  }
  const int64_t tiles = (int64_t{p.rows} + Tile::kCluster * Tile::kRows - 1) / (Tile::kCluster * Tile::kRows) *
                        ((p.columns + Tile::kColumns - 1) / Tile::kColumns);
  const int64_t clusters = std::min<int64_t>(p.first + tiles + p.last, multiprocessors / Tile::kCluster);
  return launch_clusters<T, Tile, RightTransposed>(maps, p, first, clusters, stream, beside);
}

// What a product would make first of left, by itself: p has no columns.
template <typename T, typename First>
cudaError_t launch_first(const HalfMatrix& left, const ProductProblem& p, const First& first, cudaStream_t stream) {
  using Tile = HopperTile<256>;
  ProductMaps maps{};
  if (!encode_map<T>(&maps.left, left, Tile::kRows)) return cudaErrorInvalidValue;
  return launch_clusters<T, Tile, false>(maps, p, first, p.first, stream, /*beside=*/false);
}

// ProductProblem::group: 4 was as fast as 8 and 16 or up to 4% faster at every shape.
constexpr int kGroup = 4;

template <typename T, bool RightTransposed, typename First>
cudaError_t launch_product(const ProductMatrices& m, ProductProblem p, const First& first, int multiprocessors,
                           cudaStream_t stream, bool beside) {
  p.group = kGroup;
  return choose_product(p.rows, p.columns, multiprocessors).width == 256
             ? launch_product_tiles<T, HopperTile<256>, RightTransposed>(m, p, first, multiprocessors, stream, beside)
             : launch_product_tiles<T, HopperTile<128>, RightTransposed>(m, p, first, multiprocessors, stream, beside);
}

}  // namespace dora_ext
