// What the CUDA faces share. A face reads like this:
//
//   check_op(...);                                       // csrc/check.h
//   const c10::cuda::CUDAGuard guard(x.device());
//   const Tensor x_ = x.contiguous();
//   Tensor y = at::empty_like(x_);
//   switch_dtype(x.scalar_type(), [&](auto tag) {
//     using T = typename decltype(tag)::type;
//     launch_op<T>(data<T>(x_), mutable_data<T>(y), current_stream());
//   });
//   C10_CUDA_KERNEL_LAUNCH_CHECK();                      // covers every launch and attribute call before it
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../aligned.h"
#include "dtype.cuh"

namespace dora_ext {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}) with the device type of dtype t.
template <typename F>
void switch_dtype(at::ScalarType t, F&& f) {
  switch (t) {
    case at::kBFloat16:
      return f(TypeTag<__nv_bfloat16>{});
    case at::kHalf:
      return f(TypeTag<__half>{});
    case at::kFloat:
      return f(TypeTag<float>{});
    case at::kDouble:
      return f(TypeTag<double>{});
    default:
      TORCH_CHECK_TYPE(false, "expected bfloat16, float16, float32 or float64, got ", t);
  }
}

template <typename T>
const T* data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Dtype dtype_of(const at::Tensor& t) {
  const auto d = t.scalar_type();
  return d == at::kBFloat16 ? Dtype::kBFloat16
         : d == at::kHalf   ? Dtype::kHalf
         : d == at::kFloat  ? Dtype::kFloat
                            : Dtype::kDouble;
}

// `t` must be contiguous and outlive the launch.
inline FeatureVector feature_vector(const at::Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t)};
}
inline FeatureResult feature_result(const at::Tensor& t) {
  return {t.mutable_data_ptr(), dtype_of(t)};
}

inline cudaStream_t current_stream() {
  return c10::cuda::getCurrentCUDAStream();
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Of the current device: launchers size their grids by the first and choose their kernels by the others.
inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}
inline int shared_bytes_per_block() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
// 90 for 9.0.
inline int capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

}  // namespace dora_ext
