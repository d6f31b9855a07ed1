// Hopper's barriers as functions: those in shared memory, which also count bytes, and those that have names; and what
// threads of a warpgroup or blocks of a cluster ask of each other. Shared memory is named by its 32-bit address
// (shared_address in mma.cuh).
#pragma once

#include <cstdint>

#include "mma.cuh"

namespace dora_ext {

// ---------------------------------------------------------------------------------------------------------------------
// Barriers (8 bytes each). One phase ends when `count` arrivals and all announced bytes have come, and the next begins.

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(count) : "memory");
}

// After the last barrier_init: the TMA and the other blocks of the cluster may see them from the next cluster_sync()
// on.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives once what this thread has asked for by copy16_async and copy_few_async has come.
__device__ __forceinline__ void copies_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that the TMA is to bring.
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier that lies at this address in block `rank` of the cluster. Orders no ordinary memory accesses
// of other blocks: it frees memory that wgmma has read for the TMA to write, and neither is one.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

#define DORA_BARRIER_WAIT(order)              \
  uint32_t ended;                             \
  do {                                        \
    asm volatile(                             \
        "{\n.reg .pred ended;\n"              \
        "mbarrier.try_wait.parity" order      \
        ".shared::cta.b64 ended, [%1], %2;\n" \
        "selp.u32 %0, 1, 0, ended;\n}\n"      \
        : "=r"(ended)                         \
        : "r"(barrier), "r"(parity)           \
        : "memory");                          \
  } while (ended == 0)

// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, 0 for the third... Of a fresh
// barrier, the phase before the first counts as ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  DORA_BARRIER_WAIT("");
}
// The same for what ordinary stores of another block of the cluster wrote (tell_number_at).
__device__ __forceinline__ void barrier_wait_for_cluster(uint32_t barrier, uint32_t parity) {
  DORA_BARRIER_WAIT(".acquire.cluster");
}
#undef DORA_BARRIER_WAIT

// Writes a number into the shared memory of block `rank` of the cluster and arrives at a barrier there; both addresses
// are those of this block. Who has waited by barrier_wait_for_cluster reads the number.
__device__ __forceinline__ void tell_number_at(uint32_t address, uint32_t number, uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 number, remote;\n"
      "mapa.shared::cluster.u32 number, %0, %3;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "st.shared::cluster.u32 [number], %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(address),
      "r"(number), "r"(barrier), "r"(rank)
      : "memory");
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_shared_pair(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ uint4 load_shared_four(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(value) : "memory");
}

// threadIdx.x, found where it is asked for: what follows from it cannot move out of a loop, where it would take
// registers from others.
__device__ __forceinline__ int thread_here() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

// A block alone is a cluster of one.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// Of some warps, among several groups; id 1 to 15.
template <int Threads>
__device__ __forceinline__ void some_sync(int id) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(Threads) : "memory");
}
// Counts as one of them and goes on.
template <int Threads>
__device__ __forceinline__ void some_arrive(int id) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "n"(Threads) : "memory");
}
__device__ __forceinline__ void warpgroup_sync(int id) {
  some_sync<128>(id);
}

// How many registers each thread of this warpgroup may use from here on: fewer, or more once others gave theirs back.
template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Registers));
}

}  // namespace dora_ext
