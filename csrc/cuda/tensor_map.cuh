// How a matrix in global memory is described to Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "dtype.cuh"

namespace dora_ext {

// A matrix of 16-bit numbers: x along the contiguous dimension. On 16 bytes, as are its lines.
struct HalfMatrix {
  const void* data;
  int64_t x, y, line;  // line: numbers from one y to the next, a multiple of 8
};

// The driver's function, found without linking the driver. Null if it has none.
inline decltype(&cuTensorMapEncodeTiled) map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encoder;
}

// A map for boxes of 64 x `height`, swizzled by 128 bytes.
template <typename T>
bool encode_map(CUtensorMap* map, const HalfMatrix& m, int height) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(m.x), static_cast<cuuint64_t>(m.y)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(m.line) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(height)}, steps[2] = {1, 1};
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto encode = map_encoder();
  return encode != nullptr &&
         encode(map, kType, 2, const_cast<void*>(m.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// A map for boxes of 256 columns x `rows` x `boxes`, swizzled by 128 bytes, of a weight (out, in) in 4 bits: on 16
// bytes, in a multiple of 256.
inline bool encode_packed_map(CUtensorMap* map, const void* packed, int64_t in, int64_t out, int rows, int boxes) {
  const cuuint64_t sizes[3] = {128, static_cast<cuuint64_t>(out), static_cast<cuuint64_t>(in) / 256};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(in) / 2, 128};
  const cuuint32_t box[3] = {128, static_cast<cuuint32_t>(rows), static_cast<cuuint32_t>(boxes)}, steps[3] = {1, 1, 1};
  const auto encode = map_encoder();
  return encode != nullptr &&
         encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(packed), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace dora_ext
