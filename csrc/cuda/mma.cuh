// Tensor-core and asynchronous-copy instructions as functions. The differences between sm_75 and what came after are
// settled here and nowhere else: kernels call these on every architecture.
//
//   copy16_async, copy_commit, copy_wait   global -> shared, in flight while the warp computes. sm_75: a plain load.
//   copy_few_async, prefetch_to_l2         the same for 4 or 8 bytes; global -> L2
//   load_matrix_x4 (ldmatrix)              8x8 tiles of 16-bit numbers, shared memory -> mma fragments
//   mma_m16n8k16<T>                        16x8 += 16x16 * 16x8, T fp16 or bf16, sums in fp32
//
// Fragments of mma_m16n8k16, with g = lane / 4 and t = lane % 4; a register holds two numbers, the first in its low
// half:
//   a[0]: row g,     k 2t, 2t+1      a[1]: row g + 8, k 2t, 2t+1
//   a[2]: row g,     k 2t+8, 2t+9    a[3]: row g + 8, k 2t+8, 2t+9
//   b[0]: k 2t, 2t+1,     column g   b[1]: k 2t+8, 2t+9, column g
//   d[0], d[1]: row g, columns 2t, 2t+1      d[2], d[3]: row g + 8, columns 2t, 2t+1
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace dora_ext {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kBeforeAmpere = true;
#else
constexpr bool kBeforeAmpere = false;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Copies

// PTX wants shared memory as a 32-bit offset.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, both 16-byte aligned, past L1 and past the registers. Not `valid`: zeros are
// written and src is not read (it must still be a pointer into the tensor). For streams that are used once per block.
__device__ __forceinline__ void copy16_async(void* dst, const void* src, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(dst)), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(dst) = valid ? __ldg(static_cast<const uint4*>(src)) : uint4{};
#endif
}

// 4 or 8 bytes, aligned to that. Through L1: there is no way past it for so few.
template <int Bytes>
__device__ __forceinline__ void copy_few_async(void* dst, const void* src) {
  static_assert(Bytes == 4 || Bytes == 8);
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(shared_address(dst)), "l"(src), "n"(Bytes)
               : "memory");
#else
  using Word = std::conditional_t<Bytes == 4, uint32_t, uint2>;
  *static_cast<Word*>(dst) = __ldg(static_cast<const Word*>(src));
#endif
}

// Asks for what lies there to be in the L1 or the L2 cache when it is read.
__device__ __forceinline__ void prefetch_to_l1(const void* src) {
  asm volatile("prefetch.global.L1 [%0];\n" ::"l"(src));
}
__device__ __forceinline__ void prefetch_to_l2(const void* src) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(src));
}

// Closes a group of copies. A thread commits one group per stage, an empty one too, so that counting stays simple.
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most `Pending` of this thread's groups are still in flight. Other threads' copies need a
// __syncthreads() after it.
template <int Pending>
__device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Fragments

// Four 8x8 tiles. Lane l passes the address (16-byte aligned) of row l % 8 of tile l / 8; r[i] gets tile i: lane l
// holds row l / 4, columns 2 (l % 4) and the next. Transposed: column l / 4, rows 2 (l % 4) and the next.
//   a from row-major (row, k):     tiles (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15)
//   a from row-major (k, row):     the same tiles where they lie in (k, row), Transposed
//   b from row-major (column, k):  not Transposed: r[0], r[1] = b of columns 0-7 at k 0-7 and k 8-15
//   b from row-major (k, column):  Transposed: r[0], r[1] likewise
// Rows that start 16 bytes apart modulo 128 (a row pitch of 16 bytes more than a multiple of 128) meet no bank
// conflict.
template <bool Transposed = false>
__device__ __forceinline__ void load_matrix_x4_at(uint32_t (&r)[4], uint32_t address) {
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}
template <bool Transposed = false>
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* p) {
  load_matrix_x4_at<Transposed>(r, shared_address(p));
}

// Two numbers of a register as floats. Exact.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {  // a bf16 is the upper half of a float
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
}

// Two floats in a register, rounded to nearest even; the inverse of unpack.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// The nearest number of T, as a float. A bf16 with zeros below it is that float.
template <typename T>
__device__ __forceinline__ float round_to(float v) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    uint32_t rounded;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(rounded) : "f"(v), "f"(0.f));
    return __uint_as_float(rounded);
  }
#endif
  return unpack<T>(pack<T>(v, 0.f)).x;
}

// ---------------------------------------------------------------------------------------------------------------------
// Products

// d += a b. All 32 lanes of the warp take part; blockDim.x must be a multiple of 32.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// sm_75 multiplies fp16 in steps of k = 8 and has no bf16 tensor cores: there every lane fetches its rows and columns
// from the lanes that hold them and sums in fp32. Slow, exact, and the same fragments.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
    }
  } else {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float2 top = unpack<T>(__shfl_sync(~0u, a[2 * k], (lane & ~3) | q));
        const float2 bottom = unpack<T>(__shfl_sync(~0u, a[2 * k + 1], (lane & ~3) | q));
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float2 column = unpack<T>(__shfl_sync(~0u, b[k], (2 * (lane & 3) + c) * 4 + q));
          d[c] = fmaf(top.x, column.x, fmaf(top.y, column.y, d[c]));
          d[2 + c] = fmaf(bottom.x, column.x, fmaf(bottom.y, column.y, d[2 + c]));
        }
      }
    }
  }
}
#else
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "fp16 or bf16");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
#endif

}  // namespace dora_ext
