// What the runtime says of a kernel, launches that overlap, and what differs where Hopper does.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace dora_ext {

struct KnownKernel {
  cudaFuncAttributes attributes{};  // all zeros where the runtime has none
  size_t shared = 0;                // dynamic shared memory that a block of it may have
};

struct LockedKernel {
  std::unique_lock<std::mutex> lock;
  KnownKernel& known;
};

// What is known of `kernel` on the current device, for one thread at a time. The runtime is asked once, not at every
// launch.
inline LockedKernel known_kernel(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, KnownKernel> kernels;
  int device = 0;
  cudaGetDevice(&device);
  std::unique_lock<std::mutex> lock(mutex);
  const auto [at, is_new] = kernels.try_emplace({device, kernel});
  KnownKernel& known = at->second;
  if (is_new) {
    if (cudaFuncGetAttributes(&known.attributes, kernel) != cudaSuccess) {
      known.attributes = {};
      cudaGetLastError();  // not for the next launch to report
    }
    constexpr size_t kAlways = 48 << 10;
    known.shared = kAlways - std::min(kAlways, known.attributes.sharedSizeBytes);
  }
  return {std::move(lock), known};
}

template <typename Kernel>
cudaFuncAttributes attributes_of(Kernel* kernel) {
  return known_kernel(reinterpret_cast<const void*>(kernel)).known.attributes;
}

// Lets a block of `kernel` have that many bytes of dynamic shared memory, from here on. What fails, fails again at the
// launch, whose check reports it.
template <typename Kernel>
void allow_shared(Kernel* kernel, int64_t bytes) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  const LockedKernel locked = known_kernel(function);
  if (bytes <= static_cast<int64_t>(locked.known.shared)) return;
  const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (cudaFuncSetAttribute(function, limit, static_cast<int>(bytes)) == cudaSuccess) locked.known.shared = bytes;
}

// Is a kernel of wgmma in this build? For everything but sm_90a it is compiled empty, and then it needs few registers.
template <typename Kernel>
bool has_hopper_code(Kernel* kernel) {
  return attributes_of(kernel).numRegs >= 128;
}

// How many blocks are to share the registers and the memory of a multiprocessor: what was measured to be best on sm_90.
// Elsewhere the compiler has its way, which spills none.
constexpr int blocks_on_hopper(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 1;
#else
  return blocks;
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Programmatic dependent launch

// Waits until the launch before this one has finished and its results can be read. A no-op in an ordinary launch.
__device__ __forceinline__ void wait_for_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The next launch may start once all blocks of this one have come here; without it, once they have ended.
__device__ __forceinline__ void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// `kernel`, set up beside the launch before it where it was compiled to wait for that by itself. What the architecture
// of the device says is not enough: it may run code that was compiled for an older one.
template <typename... Args>
void launch_beside(void (*kernel)(Args...), dim3 blocks, unsigned threads, size_t shared, cudaStream_t stream,
                   Args... args) {
  cudaLaunchAttribute beside{};
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &beside;
  config.numAttrs = attributes_of(kernel).ptxVersion >= 90 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace dora_ext
