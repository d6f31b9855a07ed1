// Where a tensor's numbers lie: kernels load vectors, and a view may start anywhere.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace dora_ext {

inline bool lies_on(const at::Tensor& t, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0;
}

// t, or a copy where it isn't contiguous or doesn't start on so many bytes.
inline at::Tensor aligned(const at::Tensor& t, uintptr_t bytes) {
  const at::Tensor c = t.contiguous();
  return lies_on(c, bytes) ? c : c.clone();
}

}  // namespace dora_ext
