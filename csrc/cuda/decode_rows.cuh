// What the decode kernel multiplies: 16 rows of W, dense or packed in NF4, as fragments of the tensor cores.
//
// W is the left operand, its rows the 16 of the product; the tokens are its 8 columns. The order of k inside a product
// is free as long as both operands have it, so a lane takes 16 bytes in a row from memory and they are its fragments
// as they lie. With g = lane / 4 and t = lane % 4 (see mma.cuh), one step of a warp covers
//
//   dense    64 columns: lane t has columns 8t ... 8t + 7 and 32 + 8t ... 32 + 8t + 7 of rows g and g + 8
//   packed  128 columns: lane t has columns 32t ... 32t + 31 of rows g and g + 8, which share one scale a row
//
// and of x, token g, the same columns. Beyond `in` all is zero.
#pragma once

#include "../decode.h"
#include "dtype.cuh"
#include "mma.cuh"
#include "nf4.cuh"

namespace dora_ext {

// 16 bytes that are used once: past L1, where x is to stay.
__device__ __forceinline__ uint4 load_streaming(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Word i of four; i is a constant after unrolling.
__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// This lane's rows of a tile, and its token.
template <typename T>
struct DecodeLane {
  const T* x;  // token g from column 0 on; null: there is none, zeros
  int in;
  int t;

  __device__ __forceinline__ uint4 load_x(int column) const {
    return x != nullptr && column < in ? __ldg(reinterpret_cast<const uint4*>(x + column)) : uint4{};
  }
};

template <typename T>
struct DenseWeight {
  static constexpr int kColumns = 64;
  struct Step {
    uint4 top[2], bottom[2], x[2];
  };

  const T* data;  // (out, in), 16-byte aligned; in is a multiple of 8

  // What is kept of a tile; top and bottom are rows.
  struct Tile {
    const T *top, *bottom;
  };
  __device__ Tile tile(int64_t first, int64_t top, int64_t bottom, int in) const {
    return {data + top * in, data + bottom * in};
  }
  __device__ void stage(int64_t first, int64_t end, int in, float* shared) const {}

  __device__ static __forceinline__ void load(const Tile& w, const DecodeLane<T>& lane, int column, Step& s) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int at = column + 32 * v + 8 * lane.t;
      const bool inside = at < lane.in;
      s.top[v] = inside ? load_streaming(w.top + at) : uint4{};
      s.bottom[v] = inside ? load_streaming(w.bottom + at) : uint4{};
      s.x[v] = lane.load_x(at);
    }
  }

  __device__ __forceinline__ void multiply(const Tile&, const DecodeLane<T>&, int, const Step& s, const float*, float,
                                           float (&sum)[4]) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int m = 0; m < 4; m += 2) {
        const uint32_t a[4] = {word_of(s.top[v], m), word_of(s.bottom[v], m), word_of(s.top[v], m + 1),
                               word_of(s.bottom[v], m + 1)};
        const uint32_t b[2] = {word_of(s.x[v], m), word_of(s.x[v], m + 1)};
        mma_m16n8k16<T>(sum, a, b);
      }
    }
  }
};

// Where scale i of a tile lies in shared memory: rows are mostly a multiple of 32 scales apart, which would put all
// their scales into one bank.
__host__ __device__ constexpr int scale_slot(int i) {
  return i + i / 32;
}

template <typename T>
struct PackedWeight {
  static constexpr int kColumns = 128;
  struct Step {
    uint4 top, bottom, x[4];
  };

  const uint8_t* data;  // (out * in / 2,), 16-byte aligned; in is a multiple of 32
  Nf4Scales scales;
  int block_shift;  // blocks of 32 weights or more: 16 bytes never straddle two

  struct Tile {
    const uint8_t *top, *bottom;
    int top_weight, bottom_weight;  // counted from the first weight of the tile's first block
  };
  __device__ Tile tile(int64_t first, int64_t top, int64_t bottom, int in) const {
    const int64_t start = first * in >> block_shift << block_shift;
    return {data + top * in / 2, data + bottom * in / 2, static_cast<int>(top * in - start),
            static_cast<int>(bottom * in - start)};
  }

  // The scales of rows first ... end - 1, unnested. All threads of the block take part.
  __device__ void stage(int64_t first, int64_t end, int in, float* shared) const {
    const int64_t start = first * in >> block_shift;
    const int count = static_cast<int>(((end * in - 1) >> block_shift) - start) + 1;
    const bool nested = scales.nested_absmax != nullptr;
    const float offset = nested ? nested_offset<true>(scales) : 0.f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      shared[scale_slot(i)] =
          nested ? scale_at<true>(scales, start + i, offset) : scale_at<false>(scales, start + i, offset);
    }
  }

  __device__ static __forceinline__ void load(const Tile& w, const DecodeLane<T>& lane, int column, Step& s) {
    const int at = column + 32 * lane.t;
    const bool inside = at < lane.in;
    s.top = inside ? load_streaming(w.top + at / 2) : uint4{};
    s.bottom = inside ? load_streaming(w.bottom + at / 2) : uint4{};
#pragma unroll
    for (int v = 0; v < 4; ++v) s.x[v] = lane.load_x(at + 8 * v);
  }

  // Weights k and k + 1 of a word, rounded. Lane l holds value l % 16 of the codebook, as in dequantize_nf4.
  __device__ static __forceinline__ uint32_t pair(uint32_t word, int k, float lane_value, float scale) {
    const float first = multiply_ftz(__shfl_sync(~0u, lane_value, word >> code_bit(k), 16), scale);
    const float second = multiply_ftz(__shfl_sync(~0u, lane_value, word >> code_bit(k + 1), 16), scale);
    return pack<T>(first, second);
  }

  // All lanes of the warp take part.
  __device__ __forceinline__ void multiply(const Tile& w, const DecodeLane<T>& lane, int column, const Step& s,
                                           const float* shared, float lane_value, float (&sum)[4]) const {
    const int at = column + 32 * lane.t;
    const bool inside = at < lane.in;
    const float top = inside ? shared[scale_slot((w.top_weight + at) >> block_shift)] : 0.f;
    const float bottom = inside ? shared[scale_slot((w.bottom_weight + at) >> block_shift)] : 0.f;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const uint32_t upper = word_of(s.top, v), lower = word_of(s.bottom, v);
#pragma unroll
      for (int m = 0; m < 4; m += 2) {
        const uint32_t a[4] = {pair(upper, 2 * m, lane_value, top), pair(lower, 2 * m, lane_value, bottom),
                               pair(upper, 2 * m + 2, lane_value, top), pair(lower, 2 * m + 2, lane_value, bottom)};
        const uint32_t b[2] = {word_of(s.x[v], m), word_of(s.x[v], m + 1)};
        mma_m16n8k16<T>(sum, a, b);
      }
    }
  }
};

}  // namespace dora_ext
