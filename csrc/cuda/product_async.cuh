// Hopper's asynchronous instructions as functions: the tensor memory accelerator (TMA), and products of a warpgroup
// (wgmma). All but the plainest exist in code for sm_90a alone; whoever calls them is compiled for nothing else. Shared
// memory is named by its 32-bit address (shared_address in mma.cuh).
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "barriers.cuh"

namespace dora_ext {

// ---------------------------------------------------------------------------------------------------------------------
// TMA. One thread asks for a box of a tensor at (x, y), x along the contiguous dimension. Outside the tensor, zeros are
// read and nothing is written; a box always counts with all its bytes.

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load_box(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(
          dst),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// Of a tensor of three dimensions.
__device__ __forceinline__ void load_box(uint32_t dst, const CUtensorMap* map, int x, int y, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(dst),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

// A box of two dimensions into every block of the cluster whose bit is set in `blocks`, at the same address, with word
// to the barrier at the same address.
__device__ __forceinline__ void load_box_to(uint16_t blocks, uint32_t dst, const CUtensorMap* map, int x, int y,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(dst),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}

// Shared memory to the tensor. What ordinary stores wrote there needs stores_before_tma() in each thread that wrote,
// and a barrier, before.
__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t src, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
      "cp.async.bulk.commit_group;\n" ::"l"(map),
      "r"(src), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void stores_before_tma() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Until all but the last `Pending` boxes that this thread stored have been read out of shared memory.
template <int Pending>
__device__ __forceinline__ void stored_boxes_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(Pending) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Word from one block to the others of the grid, through counters in global memory. Whoever has read a count, and then
// called words_before_results(), sees what was written before, by ordinary reads and through the TMA. Each thread that
// wrote calls results_before_word(), they all meet, and one of them gives word.

__device__ __forceinline__ void results_before_word() {
  __threadfence();
  asm volatile("fence.proxy.async.global;\n" ::: "memory");
}
__device__ __forceinline__ void give_word(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;\n" ::"l"(counter) : "memory");
}
__device__ __forceinline__ unsigned words_given(const unsigned* counter) {
  unsigned given;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];\n" : "=r"(given) : "l"(counter));
  return given;
}
__device__ __forceinline__ void words_before_results() {
  __threadfence();
  asm volatile("fence.proxy.async.global;\n" ::: "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma. A warpgroup multiplies 64 x 16 by 16 x N out of shared memory; sums in fp32 registers, spread as mma_m16n8k16
// spreads them: warp w has rows 16 w to 16 w + 15, and d[4 j] to d[4 j + 3] are its fragment of columns 8 j to 8 j + 7.
//
// Both operands lie as the TMA puts boxes with a swizzle of 128 bytes, at multiples of 1024 bytes:
//   k contiguous     (row, k): boxes of 64 k, 128 bytes a row; 8 rows are 1024 bytes. 16 k on are 32 bytes on.
//   rows contiguous  (k, row): boxes of 64 k x 64 rows (8192 bytes), side by side. 16 k on are 2048 bytes on.
// A descriptor holds address, distance of boxes and distance of groups of eight, all over 16, and the swizzle.

constexpr uint64_t kSwizzled = uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32;

__device__ __forceinline__ uint64_t describe_inner_contiguous(uint32_t address) {
  return kSwizzled | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}
__device__ __forceinline__ uint64_t describe_rows_contiguous(uint32_t address) {
  return kSwizzled | uint64_t{8192 >> 4} << 16 | (address & 0x3ffff) >> 4;
}

// Before the first product, and after registers of the sums were written otherwise.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
// Closes a group of products...
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// ...and waits until at most `Pending` groups are unfinished.
template <int Pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}

// The compiler does not know that the sums change until products_wait(): it must not move their use before it.
template <int N>
__device__ __forceinline__ void sums_are_ready(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// "%10, %11, ... %19, " for 1; d[i], d[i + 1], ... as operands.
#define DORA_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define DORA_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DORA_16 DORA_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DORA_32 DORA_16 ", %16, %17, %18, %19, " DORA_TEN(2) "%30, %31"
#define DORA_SIXTY DORA_8 ", %8, %9, " DORA_TEN(1) DORA_TEN(2) DORA_TEN(3) DORA_TEN(4) DORA_TEN(5)
#define DORA_64 DORA_SIXTY "%60, %61, %62, %63"
#define DORA_128 \
  DORA_SIXTY DORA_TEN(6) DORA_TEN(7) DORA_TEN(8) DORA_TEN(9) DORA_TEN(10) DORA_TEN(11) "%120, %121, %122, %123, %124, " \
                                                                                       "%125, %126, %127"
#define DORA_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DORA_D8(i) DORA_D4(i), DORA_D4(i + 4)
#define DORA_D16(i) DORA_D8(i), DORA_D8(i + 8)
#define DORA_D64(i) DORA_D16(i), DORA_D16(i + 16), DORA_D16(i + 32), DORA_D16(i + 48)
// shape, the list of sums in the text, the numbers of the five operands after them, the sums as operands
#define DORA_WGMMA(shape, type, list, a, b, p, u, t, ...)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type \
               " {" list "}, " a ", " b ", p, 1, 1, " u ", " t ";\n}\n"                                                \
               : __VA_ARGS__                                                                                           \
               : "l"(left), "l"(right), "r"(accumulate), "n"(int{LeftTransposed}), "n"(int{RightTransposed}))

// d += left right, or = where accumulate is 0. RightTransposed, LeftTransposed: it has its rows contiguous.
template <typename T, bool RightTransposed, bool LeftTransposed = false>
__device__ __forceinline__ void multiply_k16(float (&d)[128], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    DORA_WGMMA("m64n256k16", "f16", DORA_128, "%128", "%129", "%130", "%131", "%132", DORA_D64(0), DORA_D64(64));
  } else {
    DORA_WGMMA("m64n256k16", "bf16", DORA_128, "%128", "%129", "%130", "%131", "%132", DORA_D64(0), DORA_D64(64));
  }
}
template <typename T, bool RightTransposed, bool LeftTransposed = false>
__device__ __forceinline__ void multiply_k16(float (&d)[64], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    DORA_WGMMA("m64n128k16", "f16", DORA_64, "%64", "%65", "%66", "%67", "%68", DORA_D64(0));
  } else {
    DORA_WGMMA("m64n128k16", "bf16", DORA_64, "%64", "%65", "%66", "%67", "%68", DORA_D64(0));
  }
}
template <typename T, bool RightTransposed, bool LeftTransposed = false>
__device__ __forceinline__ void multiply_k16(float (&d)[32], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    DORA_WGMMA("m64n64k16", "f16", DORA_32, "%32", "%33", "%34", "%35", "%36", DORA_D16(0), DORA_D16(16));
  } else {
    DORA_WGMMA("m64n64k16", "bf16", DORA_32, "%32", "%33", "%34", "%35", "%36", DORA_D16(0), DORA_D16(16));
  }
}
template <typename T, bool RightTransposed, bool LeftTransposed = false>
__device__ __forceinline__ void multiply_k16(float (&d)[16], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    DORA_WGMMA("m64n32k16", "f16", DORA_16, "%16", "%17", "%18", "%19", "%20", DORA_D16(0));
  } else {
    DORA_WGMMA("m64n32k16", "bf16", DORA_16, "%16", "%17", "%18", "%19", "%20", DORA_D16(0));
  }
}
template <typename T, bool RightTransposed, bool LeftTransposed = false>
__device__ __forceinline__ void multiply_k16(float (&d)[8], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    DORA_WGMMA("m64n16k16", "f16", DORA_8, "%8", "%9", "%10", "%11", "%12", DORA_D8(0));
  } else {
    DORA_WGMMA("m64n16k16", "bf16", DORA_8, "%8", "%9", "%10", "%11", "%12", DORA_D8(0));
  }
}

#undef DORA_TEN
#undef DORA_8
#undef DORA_16
#undef DORA_32
#undef DORA_SIXTY
#undef DORA_64
#undef DORA_128
#undef DORA_D4
#undef DORA_D8
#undef DORA_D16
#undef DORA_D64
#undef DORA_WGMMA

// Four 8x8 tiles of 16-bit numbers from fragments to shared memory; the inverse of load_matrix_x4.
__device__ __forceinline__ void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace dora_ext
