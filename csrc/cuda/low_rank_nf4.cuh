// Where the tiles of low_rank.cuh get a W that is packed in NF4: bytes go to shared memory as they are, and each lane
// unpacks the weights that its mma results belong to, into registers. The scales of a tile are worked out by the block
// together, a tile ahead, each once.
#pragma once

#include "low_rank.cuh"
#include "nf4.cuh"

namespace dora_ext {

// (out, in), with rows that are 16-byte aligned: in is a multiple of 32. Columns 2^group_shift q and the following
// share a scale in every row; 2^group_shift is 32 at least and divides both in and the blocksize.
struct Nf4Matrix {
  const uint8_t* packed;
  Nf4Scales scales;
  int block_shift, group_shift;
};

// The largest group_shift that a tile can use; below 5: none.
inline int group_shift_of(int64_t in, int block_shift) {
  int shift = 0;
  while (shift < 7 && shift < block_shift && (in >> shift) % 2 == 0) ++shift;
  return shift;
}

template <typename T>
struct Nf4Source {
  static constexpr int pitch(int columns) { return columns / 2 + 16; }
  static constexpr int scale_pitch(int columns) { return columns / 32 + 1; }
  static constexpr int tile_bytes(int features, int columns) { return features * pitch(columns); }
  static constexpr int own_bytes(int features, int columns) { return 2 * 4 * features * scale_pitch(columns); }
  static constexpr int kHeld = 2;  // scales of a tile that a thread may have to work out

  const NormProblem<T>& p;
  const Nf4Matrix& matrix;
  const float lane_value = kNf4Device.value[threadIdx.x % 16];
  const float offset = matrix.scales.offset != nullptr ? *matrix.scales.offset : -0.f;
  float* scales = nullptr;  // of two tiles, by turns
  int64_t feature0 = 0, column0 = 0;
  int tiles = 0;
  float held[kHeld] = {};  // of the tile after the next: its scale; nested: the scale of its scale
  int code[kHeld] = {};    // nested only; -1: none

  template <typename Tile>
  __device__ __forceinline__ void load(void* stage, int64_t first_feature, int64_t column) const {
    constexpr int kWidth = Tile::kColumns / 32, kAll = Tile::kFeatures * kWidth;
    static_assert(kAll % Tile::kThreads == 0, "every thread has the same number of copies");
#pragma unroll
    for (int i = 0; i < kAll / Tile::kThreads; ++i) {
      const int c = threadIdx.x + i * Tile::kThreads;
      const int f = c / kWidth, k = c % kWidth * 32;
      const bool valid = first_feature + f < p.out && column + k < p.in;
      const int64_t weight = (first_feature + f) * p.in + column + k;
      copy16_async(static_cast<uint8_t*>(stage) + f * pitch(Tile::kColumns) + k / 2,
                   matrix.packed + (valid ? weight / 2 : 0), valid);
    }
  }

  // The place in a tile of scale `e` of this thread: feature, and first column >> group_shift.
  template <typename Tile>
  __device__ __forceinline__ void place(int e, int& feature, int& group) const {
    const int c = threadIdx.x + e * Tile::kThreads;
    const int groups_shift = shift_of(Tile::kColumns) - matrix.group_shift;
    feature = c >> groups_shift;
    group = c & ((1 << groups_shift) - 1);
  }

  // Asks for what the scales of a tile are made of.
  template <typename Tile>
  __device__ __forceinline__ void fetch(int tile) {
    static_assert(Tile::kFeatures * (Tile::kColumns / 32) <= kHeld * Tile::kThreads, "all groups of 32 have a thread");
#pragma unroll
    for (int e = 0; e < kHeld; ++e) {
      int f, group;
      place<Tile>(e, f, group);
      const int64_t column = column0 + static_cast<int64_t>(tile) * Tile::kColumns + (group << matrix.group_shift);
      held[e] = 0;
      code[e] = -1;
      if (tile < tiles && f < Tile::kFeatures && feature0 + f < p.out && column < p.in) {
        const int64_t block = ((feature0 + f) * p.in + column) >> matrix.block_shift;
        if (matrix.scales.nested_absmax != nullptr) {
          code[e] = static_cast<const uint8_t*>(matrix.scales.absmax)[block];
          held[e] = matrix.scales.nested_absmax[block >> matrix.scales.nested_shift];
        } else {
          held[e] = static_cast<const float*>(matrix.scales.absmax)[block];
        }
      }
    }
  }

  // Puts the scales of the tile that was asked for into shared memory, zeros outside of W.
  template <typename Tile>
  __device__ __forceinline__ void settle(int tile) {
    constexpr int kPitch = scale_pitch(Tile::kColumns);
#pragma unroll
    for (int e = 0; e < kHeld; ++e) {
      int f, group;
      place<Tile>(e, f, group);
      float scale = held[e];
      if (code[e] >= 0) scale = __fadd_rn(multiply_ftz(matrix.scales.code[code[e]], scale), offset);
      if (f < Tile::kFeatures) scales[(tile % 2 * Tile::kFeatures + f) * kPitch + group] = scale;
    }
  }

  template <typename Tile>
  __device__ __forceinline__ void start(void* own, int64_t first_feature, int64_t first_column, int count) {
    scales = static_cast<float*>(own);
    feature0 = first_feature;
    column0 = first_column;
    tiles = count;
    fetch<Tile>(0);
    settle<Tile>(0);
    fetch<Tile>(1);
  }

  // After the barrier of tile i nobody reads the scales of tile i - 1 any more; the next barrier shows those of i + 1.
  template <typename Tile>
  __device__ __forceinline__ void advance(int i) {
    settle<Tile>(i + 1);
    fetch<Tile>(i + 2);
  }

  // Byte t of a word of 8 columns is what lane t of four has of them. The index of a shuffle counts modulo 16.
  template <typename Tile>
  __device__ __forceinline__ void fragment(uint32_t (&w)[4], const void* stage, int tile, int feature,
                                           int column) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int f = feature + half * 8 + threadIdx.x % 32 / 4;
      const float scale =
          scales[(tile % 2 * Tile::kFeatures + f) * scale_pitch(Tile::kColumns) + (column >> matrix.group_shift)];
      const uint2 words =
          *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(stage) + f * pitch(Tile::kColumns) + column / 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t byte = (i == 0 ? words.x : words.y) >> (threadIdx.x % 4 * 8);
        const float first = __shfl_sync(~0u, lane_value, byte >> 4, 16);
        const float second = __shfl_sync(~0u, lane_value, byte, 16);
        w[2 * i + half] = pack<T>(multiply_ftz(first, scale), multiply_ftz(second, scale));
      }
    }
  }
};

}  // namespace dora_ext
