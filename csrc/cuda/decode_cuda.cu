// linear_decode and linear_decode_nf4 on CUDA. The kernels: decode_dense.cuh, decode_nf4.cuh and decode_nf4_ring.cuh
// over decode.cuh.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>

#include "../check_decode.h"
#include "decode_dense.cuh"
#include "decode_nf4.cuh"
#include "decode_nf4_ring.cuh"
#include "launch.h"
#include "nf4_operands.h"

namespace dora_ext {
namespace {

// launch(problem) for everything beside W.
template <typename F>
std::tuple<Tensor, Tensor> decode(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                                  const OptionalTensor& bias, double scaling, F&& launch) {
  const Tensor x_ = aligned(x, 16);
  const Tensor A = aligned(lora_A.scalar_type() == x.scalar_type() ? lora_A : lora_A.to(at::kFloat), 16);
  const auto ready = [](const Tensor& t) {
    return (t.scalar_type() == at::kDouble ? t.to(at::kFloat) : t).contiguous();
  };
  const Tensor B = ready(lora_B), g = ready(gain), b = bias ? ready(*bias) : Tensor();
  const int64_t tokens = x.size(0), rank = A.size(0), out = B.size(0);
  const Tensor y = at::empty({tokens, out}, x_.options()), h = at::empty({tokens, rank}, x_.options());
  switch_dtype(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      DecodeProblem<T> p{};
      p.x = data<T>(x_);
      p.lora_A = feature_vector(A);
      p.lora_B = feature_vector(B);
      p.gain = feature_vector(g);
      p.bias = b.defined() ? feature_vector(b) : FeatureVector{nullptr, Dtype::kFloat};
      p.h = mutable_data<T>(h);
      p.y = mutable_data<T>(y);
      p.tokens = static_cast<int>(tokens);
      p.in = static_cast<int>(x.size(1));
      p.rank = static_cast<int>(rank);
      p.out = out;
      p.scaling = static_cast<float>(scaling);
      launch(p);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {y, h};
}

std::tuple<Tensor, Tensor> linear_decode(const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                                         const Tensor& lora_B, const Tensor& gain, const OptionalTensor& bias,
                                         double scaling) {
  check_linear_decode(x, weight, lora_A, lora_B, gain, bias, scaling);
  const c10::cuda::CUDAGuard guard(x.device());
  return decode(x, lora_A, lora_B, gain, bias, scaling, [&](const auto& p) {
    using T = std::decay_t<decltype(*p.x)>;
    launch_decode(p, data<T>(weight), multiprocessors(), current_stream());
  });
}

std::tuple<Tensor, Tensor> linear_decode_nf4(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                             int64_t blocksize, at::IntArrayRef shape, at::ScalarType dtype,
                                             const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                                             const OptionalTensor& offset, int64_t nested_blocksize,
                                             const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                                             const OptionalTensor& bias, double scaling) {
  check_linear_decode_nf4(x, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset,
                          nested_blocksize, lora_A, lora_B, gain, bias, scaling);
  const c10::cuda::CUDAGuard guard(x.device());
  const Nf4Operands weight(packed, absmax, nested_absmax, nested_code, offset, nested_blocksize);
  const int sms = multiprocessors();
  return decode(x, lora_A, lora_B, gain, bias, scaling, [&](const auto& p) {
    if (prefers_ring(p, sms) && decode_ring_fits(p, weight.scales, blocksize, shared_bytes_per_block(),
                                                 device_attribute(cudaDevAttrReservedSharedMemoryPerBlock))) {
      const Tensor parts = at::empty({decode_slices(p) * p.tokens * p.rank}, x.options().dtype(at::kFloat));
      C10_CUDA_CHECK(
          launch_decode_ring(p, weight.bytes(), weight.scales, mutable_data<float>(parts), sms, current_stream()));
    } else {
      launch_decode_nf4(p, weight.bytes(), weight.scales, blocksize, current_stream());
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("linear_decode", &linear_decode);
  m.impl("linear_decode_nf4", &linear_decode_nf4);
}

}  // namespace dora_ext
