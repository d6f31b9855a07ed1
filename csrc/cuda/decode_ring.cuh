// The ring of decode_nf4_ring.cuh: one token to eight over a W packed in NF4, on Hopper and newer. A block for each
// multiprocessor takes every n-th 16 rows of W, and its warps have tasks. What goes from one to another lies in shared
// memory, in a ring of stages of 16 rows x 2048 columns:
//
//   fetch     one warp: the codes by one instruction of the TMA for a stage, the scales by asynchronous copies, both
//             tied to barriers. No more than kFlight stages are asked for at a time: of all that is asked for, what
//             came first is not served first, and the multipliers would wait for all of it.
//   scale     three warps: scales to fp32
//   multiply  sixteen warps, of which eight take every second stage, 256 columns each: as in decode_nf4.cuh, bytes
//             become pairs of values out of a table, and go through the tensor cores; then scales go onto sums over 64
//             columns
//   finish    four warps: the sixteen sums of 16 rows, in the order of the warps, and all that is not W
//
//   codes, raw_scales, scales   "this is in the stage"    freed   its multipliers have read it
//   sums, taken                 the same for the sums of 16 rows, of which there are two
//
// Reading W takes no instructions of those that multiply: issuing theirs, and their reads of shared memory, are what
// binds beside memory. This file has what is fetched; what is made of it is in decode_nf4_ring.cuh.
#pragma once

#include "decode_nf4.cuh"
#include "decode_slices.cuh"
#include "product_async.cuh"

namespace dora_ext {

struct DecodeRing {
  static constexpr int kStages = 5, kFlight = 3;
  static constexpr int kTurns = 2, kStageWarps = 8;  // so many take a stage, and so many times as many warps there are
  static constexpr int kMultiplyWarps = kTurns * kStageWarps, kScaleWarps = 3, kFinishWarps = 4;
  static constexpr int kReadScales = 32 * (kStageWarps + kScaleWarps);
  static constexpr int kThreads = 32 * (kMultiplyWarps + 1 + kScaleWarps + kFinishWarps);
  static constexpr int kBox = 256, kColumns = kBox * kStageWarps, kGroups = kColumns / 64;  // columns; 128 bytes a box
  static constexpr int kScalePitch = kGroups + 4;  // of 32 scales: no bank conflict where they are read
  static constexpr int kStageBytes = kDecodeRows * kColumns / 2, kScaleBytes = kDecodeRows * kScalePitch * 4;
  static constexpr int kRawBytes = kDecodeRows * kGroups * 4;  // scales; or their codes, and two nested ones of a row

  // Shared memory, from its start, which is 1024 bytes after address 0. An entry of the table is 256 bytes, of which
  // half is used: then one instruction makes its address out of a byte of codes, if the table lies on 64 KiB.
  static constexpr int kStart = 1024, kTable = 65536 - kStart, kLowStages = 3;
  static constexpr int kRaw = kLowStages * kStageBytes, kCode = kRaw + kStages * kRawBytes;
  static constexpr int kBarriers = kCode + kDecodeCodeBytes;
  static constexpr int kHigh = kTable + 65536, kScales = kHigh + (kStages - kLowStages) * kStageBytes;
  static constexpr int kSums = kScales + kStages * kScaleBytes;
  static_assert(kBarriers + (4 * kStages + 4) * 8 <= kTable);

  __host__ __device__ static constexpr int sum_bytes(int tokens) {
    return kMultiplyWarps * tokens * kDecodeSumPitch * 4;
  }
  static int64_t shared_bytes(int tokens, int rank) {
    return kSums + 2 * sum_bytes(tokens) + int64_t{tokens} * rank * 4;
  }
  __device__ static int stage(int slot) {
    return slot < kLowStages ? slot * kStageBytes : kHigh + (slot - kLowStages) * kStageBytes;
  }
};

// Who meets where: all once the barriers in memory are there; the warps of two tasks among themselves; and, for each
// slot, those that scale wait for those that multiply a stage to have read its scales.
enum DecodeMeeting { kDecodeReady = 1, kDecodeScale, kDecodeFinish, kDecodeScalesRead };

struct DecodeBarriers {
  uint32_t codes, raw_scales, scales, freed, sums, taken;
  __device__ explicit DecodeBarriers(uint32_t first)
      : codes(first),
        raw_scales(codes + 8 * DecodeRing::kStages),
        scales(raw_scales + 8 * DecodeRing::kStages),
        freed(scales + 8 * DecodeRing::kStages),
        sums(freed + 8 * DecodeRing::kStages),
        taken(sums + 16) {}

  __device__ void init() const {
    for (int slot = 0; slot < DecodeRing::kStages; ++slot) {
      barrier_init(codes + 8 * slot, 1);
      barrier_init(raw_scales + 8 * slot, 32);
      barrier_init(scales + 8 * slot, 32 * DecodeRing::kScaleWarps);
      barrier_init(freed + 8 * slot, DecodeRing::kStageWarps);
    }
    for (int buffer = 0; buffer < 2; ++buffer) {
      barrier_init(sums + 8 * buffer, 32 * DecodeRing::kMultiplyWarps);
      barrier_init(taken + 8 * buffer, 32 * DecodeRing::kFinishWarps);
    }
    barrier_init_fence();
  }
};

// Where a task is: columns `column` on of rows `first` on, in a slot of the ring.
struct DecodeWalk {
  int first, out, in, column = 0, slot = 0;
  uint32_t parity = 0;

  template <typename T>
  __device__ explicit DecodeWalk(const DecodeProblem<T>& p)
      : first(static_cast<int>(blockIdx.x) * kDecodeRows), out(static_cast<int>(p.out)), in(p.in) {}
  __device__ __forceinline__ bool here() const { return first < out; }
  // Behind the last row, the last.
  __device__ __forceinline__ uint32_t row(int i) const { return static_cast<uint32_t>(min(first + i, out - 1)); }
  // The first block of row i's columns; as a Block of 32 bits, its lower bits.
  template <typename Block>
  __device__ __forceinline__ Block block(int i) const {
    return static_cast<Block>(row(i)) * (static_cast<uint32_t>(in) / 64) + static_cast<uint32_t>(column) / 64;
  }
  __device__ __forceinline__ bool next() {  // was it the last of these rows?
    if (++slot == DecodeRing::kStages) {
      slot = 0;
      parity ^= 1;
    }
    column += DecodeRing::kColumns;
    if (column < in) return false;
    column = 0;
    int blocks;  // asked for here, where no register need hold it
    asm volatile("mov.u32 %0, %%nctaid.x;\n" : "=r"(blocks));
    first += blocks * kDecodeRows;
    return true;
  }
};

// The scales of a stage, as they are.
template <bool Nested>
__device__ __forceinline__ void fetch_decode_scales(char* shared, const Nf4Scales& s, const DecodeWalk& at, int lane) {
  using R = DecodeRing;
  const int row = lane / 8, piece = lane % 8 * 4;  // four scales
  const bool inside = at.column + piece * 64 < at.in;
  char* const raw = shared + R::kRaw + at.slot * R::kRawBytes;
#pragma unroll
  for (int i = 0; i < kDecodeRows; i += 4) {
    const uint64_t from = at.block<uint64_t>(row + i) + piece;
    const int to = (row + i) * R::kGroups + piece;
    if constexpr (Nested) {
      if (inside) copy_few_async<4>(raw + to, static_cast<const uint8_t*>(s.absmax) + from);
    } else {
      if (inside) copy16_async(raw + 4 * to, static_cast<const float*>(s.absmax) + from);
    }
  }
  if constexpr (Nested) {
    const int groups = min(at.in - at.column, R::kColumns) / 64;
    const uint64_t block = at.block<uint64_t>(lane / 2), last = (block + groups - 1) >> s.nested_shift;
    const uint64_t own = (block >> s.nested_shift) + lane % 2;
    copy_few_async<4>(raw + kDecodeRows * R::kGroups + 4 * lane, s.nested_absmax + (own < last ? own : last));
  }
}

template <bool Nested, typename T>
__device__ __forceinline__ void decode_fetch(const DecodeProblem<T>& p, const Nf4Scales& scales, const CUtensorMap* map,
                                             char* shared, const DecodeBarriers& barriers) {
  using R = DecodeRing;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  DecodeWalk at(p), arrived(p);
  int asked = 0;
  for (; at.here(); ++asked) {
    if (asked >= R::kFlight) {
      barrier_wait(barriers.codes + 8 * arrived.slot, arrived.parity);
      arrived.next();
    }
    barrier_wait(barriers.freed + 8 * at.slot, at.parity ^ 1);
    if (lane == 0) {
      const uint32_t barrier = barriers.codes + 8 * at.slot;
      barrier_arrive_expecting(barrier, R::kStageBytes);
      load_box(shared_address(shared) + R::stage(at.slot), map, 0, at.first, at.column / R::kBox, barrier);
    }
    fetch_decode_scales<Nested>(shared, scales, at, lane);
    copies_arrive(barriers.raw_scales + 8 * at.slot);
    at.next();
  }
}

template <bool Nested, typename T>
__device__ __forceinline__ void decode_scale(const DecodeProblem<T>& p, const Nf4Scales& s, char* shared,
                                             const DecodeBarriers& barriers, int thread) {
  using R = DecodeRing;
  const int warp = thread / 32, lane = thread % 32;
  float* const code = reinterpret_cast<float*>(shared + R::kCode);
  const float offset = Nested ? nested_offset<true>(s) : 0.f;
  const uint32_t within = (1u << s.nested_shift) - 1;  // which block of those with one nested scale
  for (int i = thread; Nested && i < 256; i += 32 * R::kScaleWarps) code[i] = __ldg(s.code + i);
  some_sync<32 * R::kScaleWarps>(kDecodeScale);
  int stages = 0;
  for (DecodeWalk at(p); at.here(); at.next(), ++stages) {
    barrier_wait(barriers.raw_scales + 8 * at.slot, at.parity);
    if (stages >= R::kStages) some_sync<R::kReadScales>(kDecodeScalesRead + at.slot);
    const char* const raw = shared + R::kRaw + at.slot * R::kRawBytes;
    float* const to = reinterpret_cast<float*>(shared + R::kScales + at.slot * R::kScaleBytes) + lane;
#pragma unroll
    for (int k = 0; k < (kDecodeRows + R::kScaleWarps - 1) / R::kScaleWarps; ++k) {  // together, not one after another
      const int i = warp + k * R::kScaleWarps;
      if (i >= kDecodeRows) break;
      if constexpr (Nested) {
        const auto* absmax = reinterpret_cast<const float*>(raw + kDecodeRows * R::kGroups);
        const uint32_t second = ((at.block<uint32_t>(i) & within) + lane) >> s.nested_shift;
        const float value = code[static_cast<uint8_t>(raw[R::kGroups * i + lane])];
        to[i * R::kScalePitch] = __fadd_rn(multiply_ftz(value, absmax[2 * i + second]), offset);
      } else {
        to[i * R::kScalePitch] = reinterpret_cast<const float*>(raw)[R::kGroups * i + lane];
      }
    }
    barrier_arrive(barriers.scales + 8 * at.slot);  // each lane: what racecheck does not follow is one for all
  }
  // Nobody leaves who is waited for.
  for (int slot = 0; slot < R::kStages && slot < stages; ++slot) some_sync<R::kReadScales>(kDecodeScalesRead + slot);
}

}  // namespace dora_ext
