// What the runtime says of a kernel, launches that overlap, and what differs where Hopper does.
#pragma once

#include <cuda_runtime.h>

namespace dora_ext {

// All zeros where there are none, and no error is left for the next launch to report.
template <typename Kernel>
cudaFuncAttributes attributes_of(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  return attributes;
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
void launch_beside(void (*kernel)(Args...), const cudaFuncAttributes& facts, unsigned blocks, unsigned threads,
                   size_t shared, cudaStream_t stream, Args... args) {
  cudaLaunchAttribute beside{};
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &beside;
  config.numAttrs = facts.ptxVersion >= 90 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace dora_ext
