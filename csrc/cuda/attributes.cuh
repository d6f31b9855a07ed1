// What the runtime says of a kernel.
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

}  // namespace dora_ext
