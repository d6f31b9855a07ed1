// The products of decode.cuh with a W packed in NF4, which stays in the codes that it is packed in: the tensor cores
// multiply values of the codebook, and the scale of a block goes onto the sum over 64 columns.
//
// What would bind beside memory is looking values up. Here a byte is one look-up in shared memory for both its weights,
// in a table of the 256 pairs with a copy for each lane, so that lanes don't wait for each other.
//
// The values are rounded to T, times a constant with which all sixteen lie close to numbers of T: that takes 0.8e-3
// (fp16: 0.8e-4) from the weights, half of what a rounding of each product of value and scale would.
//
// With g = lane / 4 and t = lane % 4 (see mma.cuh), one step of a warp covers 128 columns, two groups of 64: lane t has
// columns 16t ... 16t + 15 of each group of rows g and g + 8, and of x, token g, the same columns. Between memory and
// shared memory a lane moves 32 columns in a row.
#pragma once

#include "decode.cuh"
#include "nf4.cuh"

namespace dora_ext {

// The root of the mean square of v - round(c v) / c over the weights of a normal distribution is smallest there.
template <typename T>
constexpr float kDecodeCodeFactor = std::is_same_v<T, __half> ? 1.36619f : 1.436715f;

// In shared memory: the table, the codes of nested scales, and stages, a step of 16 rows each.
constexpr int kDecodeTableBytes = 256 * 128, kDecodeCodeBytes = 256 * 4, kDecodeStageBytes = kDecodeRows * 64;

struct PackedDecodeWeight {
  const uint8_t* data;  // (out * in / 2,), 16-byte aligned; in is a multiple of 64
  Nf4Scales scales;
  int block_shift;  // blocks of 64 weights or more, so that a group never straddles two
};

// The scales of 16 rows, counted from the block in which the first of them begins.
struct DecodeScales {
  const uint8_t* code;  // nested
  const float* absmax;  // not nested
  const float* nested;  // indexed by all blocks
  int64_t first_block;
  int shift;

  struct Raw {
    uint32_t code;
    float scale;
  };

  __device__ DecodeScales(const Nf4Scales& s, int64_t block)
      : code(static_cast<const uint8_t*>(s.absmax) + s.first_block + block),
        absmax(static_cast<const float*>(s.absmax) + s.first_block + block),
        nested(s.nested_absmax),
        first_block(s.first_block + block),
        shift(s.nested_shift) {}

  __device__ __forceinline__ Raw load(int block) const {
    if (nested == nullptr) return {0, absmax[block]};
    return {code[block], nested[(first_block + block) >> shift]};
  }
};

// kWarps divide the columns of 16 rows among them, each keeps kDepth steps in flight.
template <typename T, int kWarps, int kDepth, int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, blocks_on_hopper(kBlocks))
    decode_nf4_kernel(DecodeProblem<T> p, PackedDecodeWeight weight) {
  constexpr int kThreads = 32 * kWarps, kColumns = 128, kStride = kWarps * kColumns;
  static_assert(kThreads % 256 == 0, "a thread fills one entry of the table, or a part of it");
  __shared__ DecodeSums<kWarps> of_warp;
  extern __shared__ uint4 dynamic[];
  float* const nested_code = reinterpret_cast<float*>(dynamic + kDecodeTableBytes / 16);

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int group = lane / 4, t = lane % 4;
  const int entry = thread % 256;  // of the table and of the codes, that this thread fills
  const bool nested = weight.scales.nested_absmax != nullptr;
  const float offset = nested ? nested_offset<true>(weight.scales) : 0.f;
  const float code = nested ? __ldg(weight.scales.code + entry) : 0.f;
  const float lane_value = kNf4Device.value[lane % 16] * kDecodeCodeFactor<T>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDecodeRows;
  const int64_t end = first + kDecodeRows < p.out ? first + kDecodeRows : p.out;
  // The last block may have fewer rows; what is read in their place is not written.
  const auto row_of = [&](int row) { return first + row < end ? first + row : end - 1; };
  const uint8_t* top = weight.data + row_of(group) * p.in / 2;
  const uint8_t* bottom = weight.data + row_of(group + 8) * p.in / 2;
  const T* token = group < p.tokens ? p.x + static_cast<int64_t>(group) * p.in + 16 * t : nullptr;

  // A stage: rows of 64 bytes; their pieces of 16 are swapped around, so that eight rows meet no bank conflict.
  char* const stages =
      reinterpret_cast<char*>(dynamic) + kDecodeTableBytes + kDecodeCodeBytes + warp * kDepth * kDecodeStageBytes;
  const int swap = group & 2;
  // Of the scales of a step, one per lane: group lane % 2 of row lane / 2.
  const int64_t first_weight = first * p.in, first_block = first_weight >> weight.block_shift;
  const DecodeScales scales(weight.scales, first_block);
  const int scaled = static_cast<int>(row_of(lane / 2) * p.in - (first_block << weight.block_shift)) + lane % 2 * 64;
  DecodeScales::Raw raw[kDepth];
  const auto load = [&](int d, int column) {
    char* const stage = stages + d * kDecodeStageBytes + group * 64 + (t ^ swap) * 16;
    const bool inside = column + 32 * t < p.in;
    const unsigned at = inside ? static_cast<unsigned>(column) / 2 + 16 * t : 0;
    copy16_async(stage, top + at, inside);
    copy16_async(stage + 8 * 64, bottom + at, inside);
    if (column + lane % 2 * 64 < p.in) raw[d] = scales.load((scaled + column) >> weight.block_shift);
    copy_commit();
  };

  int column = warp * kColumns;
#pragma unroll
  for (int d = 0; d < kDepth; ++d) load(d, column + d * kStride);

  // While these come: all else. A lane has its copy of an entry at 4 * lane.
  const uint32_t pair = pack<T>(__shfl_sync(~0u, lane_value, entry / 16), lane_value);
#pragma unroll
  for (int i = thread / 256; i < 8; i += kThreads / 256) {
    dynamic[entry * 8 + (i + entry) % 8] = make_uint4(pair, pair, pair, pair);
  }
  nested_code[entry] = code;
  const DecodeEnd<T, kDecodeEndLanes<kWarps>> finisher(p, first, static_cast<int>(threadIdx.x));
  __syncthreads();

  // The two weights of byte i of a word.
  const auto look_up = [&](uint32_t word, int i) {
    const uint32_t at = ((i == 0 ? word << 7 : word >> (8 * i - 7)) & 0x7f80u) | 4u * lane;
    return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(dynamic) + at);
  };

  float sum[4] = {};
  for (; column < p.in; column += kDepth * kStride) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int here = column + d * kStride;
      if (here < p.in) {  // the same for a whole warp
        uint4 x[2][2];
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const bool inside = token != nullptr && here + 64 * q < p.in;
#pragma unroll
          for (int i = 0; i < 2; ++i) x[q][i] = load16_if(inside, token + here + 64 * q + 8 * i);
        }
        float own = 0;
        if (here + lane % 2 * 64 < p.in) {
          own = nested ? __fadd_rn(multiply_ftz(nested_code[raw[d].code], raw[d].scale), offset) : raw[d].scale;
        }
        copy_wait<kDepth - 1>();
        __syncwarp();
        const char* stage = stages + d * kDecodeStageBytes + group * 64 + t % 2 * 8;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          const char* piece = stage + ((2 * q + t / 2) ^ swap) * 16;
          const uint2 upper = *reinterpret_cast<const uint2*>(piece);
          const uint2 lower = *reinterpret_cast<const uint2*>(piece + 8 * 64);
          float product[4] = {};
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const uint32_t u = m < 2 ? upper.x : upper.y, l = m < 2 ? lower.x : lower.y;
            const int i = m % 2 * 2;
            const uint32_t a[4] = {look_up(u, i), look_up(l, i), look_up(u, i + 1), look_up(l, i + 1)};
            const uint32_t b[2] = {word_of(x[q][m / 2], i), word_of(x[q][m / 2], i + 1)};
            mma_m16n8k16<T>(product, a, b);
          }
          const float top_scale = __shfl_sync(~0u, own, 2 * group + q);
          const float bottom_scale = __shfl_sync(~0u, own, 2 * group + 16 + q);
          sum[0] = fmaf(top_scale, product[0], sum[0]);
          sum[1] = fmaf(top_scale, product[1], sum[1]);
          sum[2] = fmaf(bottom_scale, product[2], sum[2]);
          sum[3] = fmaf(bottom_scale, product[3], sum[3]);
        }
        __syncwarp();  // all have read before the stage is filled again
        load(d, here + kDepth * kStride);
      }
    }
  }
  finish_decode<T, kWarps>(p, finisher, sum, 1.f / kDecodeCodeFactor<T>, of_warp);
}

template <int kWarps, int kDepth, int kBlocks, typename T>
void launch_decode_nf4_as(const DecodeProblem<T>& p, const PackedDecodeWeight& weight, cudaStream_t stream) {
  launch_decode_as(decode_nf4_kernel<T, kWarps, kDepth, kBlocks>, p, weight, 32 * kWarps,
                   kDecodeTableBytes + kDecodeCodeBytes + kWarps * kDepth * kDecodeStageBytes, stream);
}

// packed: (out * in / 2,), 16-byte aligned. in: a multiple of 64; blocks of 64 weights or more.
template <typename T>
void launch_decode_nf4(const DecodeProblem<T>& p, const uint8_t* packed, const Nf4Scales& scales, int64_t blocksize,
                       cudaStream_t stream) {
  launch_decode_nf4_as<8, 2, 3>(p, PackedDecodeWeight{packed, scales, shift_of(blocksize)}, stream);
}

}  // namespace dora_ext
