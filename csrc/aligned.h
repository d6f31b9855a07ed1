// Tensors as an op wants them. What they are already, they stay: even a Tensor::to that has nothing to do goes through
// the dispatcher, and a layer would make a dozen of those.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace dora_ext {

inline bool lies_on(const at::Tensor& t, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0;
}

inline at::Tensor in_dtype(const at::Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

inline at::Tensor in_shape(const at::Tensor& t, at::IntArrayRef shape) {
  return t.sizes() == shape ? t : t.view(shape);
}

// Kernels load vectors, and a view may start anywhere: t, or a copy where it isn't contiguous or doesn't start on so
// many bytes.
inline at::Tensor aligned(const at::Tensor& t, uintptr_t bytes) {
  const at::Tensor c = t.contiguous();
  return lies_on(c, bytes) ? c : c.clone();
}

}  // namespace dora_ext
