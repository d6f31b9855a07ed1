// The four float dtypes inside kernels: what they accumulate in, exact loads, rounded stores, and vectors whose dtype
// is known only at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace dora_ext {

// Sums and everything per feature: fp64 for fp64, else fp32.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// torch compiles with __CUDA_NO_HALF_CONVERSIONS__, hence no casts but these.
__device__ __forceinline__ float widen(__half v) {
  return __half2float(v);
}
__device__ __forceinline__ float widen(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float widen(float v) {
  return v;
}
__device__ __forceinline__ double widen(double v) {
  return v;
}

// Rounds to nearest even.
template <typename T, typename Acc>
__device__ __forceinline__ T narrow(Acc v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(v));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(v));
  } else {
    return static_cast<T>(v);
  }
}

// In half precision, as they lie in memory.
template <typename T>
__device__ __forceinline__ uint64_t narrow_four(float4 v) {
  static_assert(sizeof(T) == 2, "four in 8 bytes");
  union {
    T numbers[4];
    uint64_t word;
  } to = {{narrow<T>(v.x), narrow<T>(v.y), narrow<T>(v.z), narrow<T>(v.w)}};
  return to.word;
}

enum class Dtype : int { kBFloat16, kHalf, kFloat, kDouble };

// A vector per feature (magnitude, bias) of any float dtype: read once per feature, so a branch costs less than a
// conversion launch or four times the templates. data may be null for an absent one; check before reading.
struct FeatureVector {
  const void* data;
  Dtype dtype;

  template <typename Acc>
  __device__ __forceinline__ Acc at(int64_t i) const {
    switch (dtype) {
      case Dtype::kBFloat16:
        return static_cast<Acc>(widen(static_cast<const __nv_bfloat16*>(data)[i]));
      case Dtype::kHalf:
        return static_cast<Acc>(widen(static_cast<const __half*>(data)[i]));
      case Dtype::kFloat:
        return static_cast<Acc>(static_cast<const float*>(data)[i]);
      default:
        return static_cast<Acc>(static_cast<const double*>(data)[i]);
    }
  }
};

// The same to be written, rounded once.
struct FeatureResult {
  void* data;
  Dtype dtype;

  template <typename Acc>
  __device__ __forceinline__ void store(int64_t i, Acc v) const {
    switch (dtype) {
      case Dtype::kBFloat16:
        static_cast<__nv_bfloat16*>(data)[i] = narrow<__nv_bfloat16>(v);
        break;
      case Dtype::kHalf:
        static_cast<__half*>(data)[i] = narrow<__half>(v);
        break;
      case Dtype::kFloat:
        static_cast<float*>(data)[i] = static_cast<float>(v);
        break;
      default:
        static_cast<double*>(data)[i] = static_cast<double>(v);
    }
  }
};

}  // namespace dora_ext
