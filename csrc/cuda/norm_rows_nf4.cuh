// Where walk_rows gets a W that is packed in NF4. Bound by instructions as much as by memory, hence:
//
//   A byte is two weights, and a table of all bytes in shared memory gives both at once. A warp's load of two floats a
//   lane is two passes of half a warp each: 16 copies of the table, one per lane of a half, leave no bank conflicts.
//   They are half of an entry's 256 bytes, which are that many for the byte to lie where __byte_perm can put it.
//
//   The packed bytes of the next tiles arrive in the other halves, the ring: enough in flight to hide the latency of
//   memory. A lane copies what itself will read, so that nothing waits for other lanes. Lanes outside of W and tiles
//   after the last read what lies nearest: a minimum costs less than branches.
//
//   Two lanes side by side have the same scales, one in row g and one in row g + 8: each decodes one of them.
//
//   The block's rows of lora_B lie in shared memory as the mma fragments that they become.
#pragma once

#include "nf4.cuh"
#include "norm_rows.cuh"

namespace dora_ext {

// (out, in): in is a multiple of what two lanes have of a row, the blocksize too; fewer than 2^36 weights.
struct Nf4Matrix {
  const uint8_t* packed;
  Nf4Scales scales;
  int block_shift;
};

// Of shared memory, one after the other: the table and the ring, the code of nested scales, lora_B, sums.
constexpr int kNf4TableBytes = 256 * 256, kNf4CodeBytes = 256 * 4;

template <typename Tile>
struct Nf4Shared {
  static constexpr int64_t kOwn = kNf4TableBytes + kNf4CodeBytes;
  static constexpr int kTileOfB = 32 * 16 * Tile::KT;

  static constexpr int64_t bytes(int64_t tiles) { return kOwn + (kTileOfB + row_sums_bytes<Tile>(1)) * tiles; }
};

template <typename T, typename Tile, bool Nested>
struct Nf4Rows {
  static_assert(Tile::kPieces == 1 && (Tile::kWidth == 32 || Tile::kWidth == 16), "16 bytes a lane, or 8");
  using Shared = Nf4Shared<Tile>;
  static constexpr bool kSharesB = true;
  static constexpr int kStages = 4;                       // tiles in the ring, one of which is being read
  static constexpr int kLaneBytes = Tile::kWidth / 2;     // of a row
  static constexpr uint32_t kHalf = 32 * kLaneBytes * 2;  // a warp's rows g, or g + 8, the table's parts included
  static constexpr uint32_t kStage = Tile::kWarps * 2 * kHalf;
  static_assert(kStages * kStage <= kNf4TableBytes);
  static constexpr int kCodes = (255 + Tile::kThreads) / Tile::kThreads;  // of the nested scales' code, a thread copies

  struct Part {
    uint32_t words[2][kLaneBytes / 4];
    float scale[2];
  };

  const NormProblem<T>& p;
  const Nf4Matrix& matrix;
  unsigned char* shared;
  const int shift = matrix.block_shift - (Tile::kWidth == 32 ? 5 : 4);  // from units of kWidth weights to blocks
  const uint32_t lane_place = kept(threadIdx.x % 16 * 8);
  uint32_t inside = 0;   // all bits, where this lane has columns
  uint32_t ring = 0;     // in `shared`: this lane's bytes of row g
  uint32_t written = 0;  // the stage that is written next; the one after it holds the oldest tile
  uint32_t unit = 0;     // this lane's in row g of the tile whose scales come next
  uint32_t decoded = 0;  // units from there to the one whose scale this lane decodes
  uint32_t last = 0;     // this lane's in the block's last row
  uint32_t below = 0;    // units to row g + 8
  uint32_t code = 0;
  float scale = 0.f;  // nested: the scale of the scale
  float offset = -0.f;
  float own_codes[kCodes] = {};

  static __device__ __forceinline__ bool odd_lane() { return threadIdx.x % 2 == 1; }

  __device__ __forceinline__ void start(int64_t row0, int rows, int64_t column0) {
    const int lane = threadIdx.x % 32, at = lane * kLaneBytes;
    const int64_t column = column0 + lane % 4 * Tile::kWidth;
    const bool has_columns = column < p.in;
    inside = kept(has_columns ? ~0u : 0);
    ring = kept(128 + threadIdx.x / 32 * 2 * kHalf + at / 128 * 256 + at % 128);
    const uint32_t units = static_cast<uint32_t>(p.in / Tile::kWidth);
    const uint32_t of_row = has_columns ? static_cast<uint32_t>(column / Tile::kWidth) : units - 1;
    unit = static_cast<uint32_t>(row0 + lane / 4) * units + of_row;
    last = kept(static_cast<uint32_t>(row0 + rows - 1) * units + of_row);
    below = 8 * units;
    decoded = kept(odd_lane() ? below : 0);
#pragma unroll
    for (int tile = 0; tile < kStages - 2; ++tile) {
      copy(unit + tile * 2 * below);
      if (tile == 0) copy_B(row0, rows);
      copy_commit();
    }
    if constexpr (Nested) {
      if (matrix.scales.offset != nullptr) offset = *matrix.scales.offset;
#pragma unroll
      for (int i = 0; i < kCodes; ++i) own_codes[i] = matrix.scales.code[(threadIdx.x + i * Tile::kThreads) % 256];
    }
    // Few bytes that every tile would wait for: all of the block's at once.
    const uint32_t first = blockIdx.y * static_cast<uint32_t>(Tile::kBlockColumns / Tile::kWidth);
#pragma unroll 1
    for (int row = threadIdx.x; row < rows; row += Tile::kThreads) {
      const uint32_t block = (static_cast<uint32_t>(row0 + row) * units + first) >> shift;
      prefetch_to_l2(static_cast<const char*>(matrix.scales.absmax) + static_cast<uint64_t>(block) * (Nested ? 1 : 4));
    }
  }

  // A register of a fragment a time, zeros for the ranks that there are not.
  __device__ __forceinline__ void copy_B(int64_t row0, int rows) const {
    constexpr int kPairs = 8 * Tile::KT, kStep = Tile::kThreads / kPairs;  // rows at a time
    static_assert(kStep % 8 == 0, "a thread stays in one lane's registers");
    const int first = threadIdx.x / kPairs, of_row = threadIdx.x % kPairs, pair = of_row % (2 * Tile::KT);
    const int lane = first % 8 * 4 + of_row / (2 * Tile::KT);
    const int left = p.rank - 2 * of_row;
    const T* from = p.lora_B + (row0 + first) * p.rank + 2 * of_row;
    unsigned char* registers = shared + Shared::kOwn + pair / 2 * 512 + lane * 16 + pair % 2 * 8;
#pragma unroll 1
    for (int row = first; row < rows; row += kStep) {
      unsigned char* to = registers + row / 16 * Shared::kTileOfB + row / 8 % 2 * 4;
      if (left > 1 && p.rank % 2 == 0) {
        copy_few_async<4>(to, from);
      } else {
        *reinterpret_cast<uint32_t*>(to) = pack<T>(left > 0 ? widen(from[0]) : 0.f, left > 1 ? widen(from[1]) : 0.f);
      }
      from += kStep * p.rank;
    }
  }

  __device__ __forceinline__ void take_B(uint32_t (&b)[2][2 * Tile::KT], int row) const {
    const unsigned char* tile = shared + Shared::kOwn + row / 16 * Shared::kTileOfB + threadIdx.x % 32 * 16;
#pragma unroll
    for (int s = 0; s < Tile::KT; ++s) {
      const uint4 v = *reinterpret_cast<const uint4*>(tile + s * 512);
      b[0][2 * s] = v.x, b[1][2 * s] = v.y, b[0][2 * s + 1] = v.z, b[1][2 * s + 1] = v.w;
    }
  }

  // A tile's packed bytes, of which this lane's in row g are unit `from`.
  __device__ __forceinline__ void copy(uint32_t from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint8_t* bytes = matrix.packed + static_cast<uint64_t>(min(from + half * below, last)) * kLaneBytes;
      unsigned char* to = shared + ring + written + half * kHalf;
      if constexpr (kLaneBytes == 16) {
        copy16_async(to, bytes);
      } else {
        copy_few_async<8>(to, bytes);
      }
    }
    written = (written + kStage) % (kStages * kStage);
  }

  // This lane's scale of a tile, and the packed bytes two tiles on.
  __device__ __forceinline__ void fetch(int) {
    copy(unit + (kStages - 2) * 2 * below);
    copy_commit();
    const uint32_t block = min(unit + decoded, last) >> shift;
    if constexpr (Nested) {
      code = static_cast<const uint8_t*>(matrix.scales.absmax)[block];
      scale = matrix.scales.nested_absmax[block >> matrix.scales.nested_shift];
    } else {
      scale = static_cast<const float*>(matrix.scales.absmax)[block];
    }
    unit += 2 * below;
  }

  __device__ __forceinline__ void share() const {
    // As constants in the instructions: no memory to wait for.
    constexpr Nf4Codebook codebook = kNf4;
    const auto one_of = [&](int first, int count, int which) {
      float value = codebook.value[first];
#pragma unroll
      for (int k = 1; k < count; ++k) {
        const float other = codebook.value[first + k];
        if (which == k) value = other;
      }
      return value;
    };
    constexpr int kHighs = Tile::kThreads / 128;  // high halves of a byte that all threads write at a time
    const float second = one_of(0, 16, threadIdx.x / 8 % 16);
#pragma unroll
    for (int high = 0; high < 16; high += kHighs) {
      const float first = one_of(high, kHighs, threadIdx.x / 128);
      unsigned char* to = shared + (high * 16 + threadIdx.x / 8) * 256 + threadIdx.x % 8 * 16;
      *reinterpret_cast<float4*>(to) = make_float4(first, second, first, second);
    }
    if constexpr (Nested) {
#pragma unroll
      for (int i = 0; i < kCodes; ++i) {
        reinterpret_cast<float*>(shared + kNf4TableBytes)[(threadIdx.x + i * Tile::kThreads) % 256] = own_codes[i];
      }
    }
    copy_wait<kStages - 2>();
    __syncthreads();
  }

  __device__ __forceinline__ void take(Part& part) const {
    copy_wait<kStages - 2>();
    const unsigned char* from = shared + ring + (written + kStage) % (kStages * kStage);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kLaneBytes == 16) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + half * kHalf);
        part.words[half][0] = v.x, part.words[half][1] = v.y, part.words[half][2] = v.z, part.words[half][3] = v.w;
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(from + half * kHalf);
        part.words[half][0] = v.x, part.words[half][1] = v.y;
      }
    }
    float own = scale;
    if constexpr (Nested) {
      const float of_code = reinterpret_cast<const float*>(shared + kNf4TableBytes)[code];
      own = __fadd_rn(multiply_ftz(of_code, own), offset);
    }
    own = __uint_as_float(__float_as_uint(own) & inside);
    const float other = __shfl_xor_sync(~0u, own, 1);
    part.scale[0] = odd_lane() ? other : own, part.scale[1] = odd_lane() ? own : other;
  }

  __device__ __forceinline__ float2 pair(const Part& part, int half, int i) const {
    const uint32_t place = __byte_perm(part.words[half][i / 4], lane_place, 0x5504 | i % 4 << 4);
    const float2 v = *reinterpret_cast<const float2*>(shared + place);
    return make_float2(round_to<T>(multiply_ftz(v.x, part.scale[half])),
                       round_to<T>(multiply_ftz(v.y, part.scale[half])));
  }
};

template <typename T, typename Tile, int kResident, bool Nested, bool Folded>
__global__ void __launch_bounds__(Tile::kThreads, kRowBlocks<kResident>)
    norm_nf4_rows_kernel(NormProblem<T> p, Nf4Matrix matrix, int64_t tiles_per_block) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  if (kNf4TableBytes >= kSharedLimit || !norm_begins(p.fingerprint)) return;
  Nf4Rows<T, Tile, Nested> source{p, matrix, shared_bytes};
  const uint32_t of_B = static_cast<uint32_t>(tiles_per_block) * Nf4Shared<Tile>::kTileOfB;
  unsigned char* sums = shared_bytes + kept(Nf4Shared<Tile>::kOwn + of_B);
  walk_rows<Folded, Tile>(p, tiles_per_block, source, reinterpret_cast<float*>(sums));
}

}  // namespace dora_ext
