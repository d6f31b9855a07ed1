// Where walk_rows gets a W that is packed in NF4. A byte is two weights: a table of all bytes in shared memory gives
// both at once, and 32 copies of it, one per lane, leave no bank conflicts.
#pragma once

#include "nf4.cuh"
#include "norm_rows.cuh"

namespace dora_ext {

// (out, in): in is a multiple of 32, the blocksize too.
struct Nf4Matrix {
  const uint8_t* packed;
  Nf4Scales scales;
  int block_shift;
};

constexpr int kNf4TableBytes = 256 * 32 * 8, kNf4CodeBytes = 256 * 4;

template <typename T, typename Tile>
struct Nf4Rows {
  static_assert(Tile::kPieces == 1 && Tile::kWidth <= 32, "a lane's weights of a row share a scale");
  struct Part {
    uint32_t words[2][Tile::kWidth / 8];
    int code[2];
    float scale[2];  // nested: the scale of the scale
  };

  const NormProblem<T>& p;
  const Nf4Matrix& matrix;
  unsigned char* table;  // kNf4TableBytes, then kNf4CodeBytes
  const bool nested = matrix.scales.nested_absmax != nullptr;
  const float offset = matrix.scales.offset != nullptr ? *matrix.scales.offset : -0.f;
  const uint32_t lane_place = threadIdx.x % 32 * 8;
  int64_t weight = 0;  // this lane's first in row g of the next tile
  bool inside = false;

  __device__ __forceinline__ void start(int64_t row, int64_t column0) {
    const int64_t column = column0 + threadIdx.x % 4 * Tile::kWidth;
    weight = row * p.in + column;
    inside = column < p.in;
  }

  __device__ __forceinline__ void fetch(Part& part, int half) const {
    if (!inside) return;
    const int64_t first = weight + half * 8 * p.in;
    const uint8_t* from = matrix.packed + first / 2;
    if constexpr (Tile::kWidth == 32) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
      part.words[half][0] = v.x, part.words[half][1] = v.y, part.words[half][2] = v.z, part.words[half][3] = v.w;
    } else {
      static_assert(Tile::kWidth == 16, "16 bytes or 8");
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
      part.words[half][0] = v.x, part.words[half][1] = v.y;
    }
    const int64_t block = first >> matrix.block_shift;
    if (nested) {
      part.code[half] = static_cast<const uint8_t*>(matrix.scales.absmax)[block];
      part.scale[half] = matrix.scales.nested_absmax[block >> matrix.scales.nested_shift];
    } else {
      part.scale[half] = static_cast<const float*>(matrix.scales.absmax)[block];
    }
  }

  __device__ __forceinline__ void advance() { weight += 16 * p.in; }

  __device__ __forceinline__ void share() const {
    for (int i = threadIdx.x; i < 256 * 16; i += Tile::kThreads) {
      const float first = kNf4Device.value[i / 256], second = kNf4Device.value[i / 16 % 16];
      reinterpret_cast<float4*>(table)[i] = make_float4(first, second, first, second);
    }
    if (nested) {
      for (int i = threadIdx.x; i < 256; i += Tile::kThreads) {
        reinterpret_cast<float*>(table + kNf4TableBytes)[i] = matrix.scales.code[i];
      }
    }
    __syncthreads();
  }

  // Outside of W the registers still hold zeros, also for the scale.
  __device__ __forceinline__ void prepare(Part& part) const {
    if (!nested || !inside) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float code = reinterpret_cast<const float*>(table + kNf4TableBytes)[part.code[half]];
      part.scale[half] = __fadd_rn(multiply_ftz(code, part.scale[half]), offset);
    }
  }

  __device__ __forceinline__ float2 pair(const Part& part, int half, int i) const {
    const uint32_t place = __byte_perm(part.words[half][i / 4], lane_place, 0x5504 | i % 4 << 4);
    const float2 v = *reinterpret_cast<const float2*>(table + place);
    return make_float2(round_to<T>(multiply_ftz(v.x, part.scale[half])),
                       round_to<T>(multiply_ftz(v.y, part.scale[half])));
  }
};

template <typename T, typename Tile, int kResident>
__global__ void __launch_bounds__(Tile::kThreads, kRowBlocks<kResident>)
    norm_nf4_rows_kernel(NormProblem<T> p, Nf4Matrix matrix, int64_t tiles_per_block) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  if (kNf4TableBytes >= kSharedLimit || !is_stale(p.fingerprint)) return;
  Nf4Rows<T, Tile> source{p, matrix, shared_bytes};
  walk_rows<Tile>(p, tiles_per_block, source, reinterpret_cast<float*>(shared_bytes + kNf4TableBytes + kNf4CodeBytes));
}

}  // namespace dora_ext
