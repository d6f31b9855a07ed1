// linear_decode and linear_decode_nf4 on CUDA. The kernels: decode.cuh.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>

#include "../check_decode.h"
#include "decode.cuh"
#include "launch.h"

namespace dora_ext {
namespace {

// The kernel loads vectors; a view may start anywhere.
Tensor aligned16(const Tensor& t) {
  const Tensor c = t.contiguous();
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0 ? c : c.clone();
}

// launch(problem) for everything beside W.
template <typename F>
std::tuple<Tensor, Tensor> decode(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                                  const OptionalTensor& bias, double scaling, F&& launch) {
  const Tensor x_ = aligned16(x);
  const Tensor A = aligned16(lora_A.scalar_type() == at::kDouble ? lora_A.to(at::kFloat) : lora_A);
  const Tensor B = lora_B.contiguous(), g = gain.contiguous(), b = bias ? bias->contiguous() : Tensor();
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
    launch_decode(p, data<T>(weight), current_stream());
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
  const auto contiguous = [](const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); };
  const auto pointer = [](const Tensor& t) { return t.defined() ? data<float>(t) : nullptr; };
  const Tensor absmax_ = absmax.contiguous();
  const Tensor nested = contiguous(nested_absmax), code = contiguous(nested_code), offset_ = contiguous(offset);
  const Nf4Scales scales{absmax_.const_data_ptr(), pointer(nested), pointer(code), pointer(offset_),
                         shift_of(nested_blocksize)};
  return decode(x, lora_A, lora_B, gain, bias, scaling, [&](const auto& p) {
    launch_decode_nf4(p, data<uint8_t>(packed), scales, blocksize, current_stream());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("linear_decode", &linear_decode);
  m.impl("linear_decode_nf4", &linear_decode_nf4);
}

}  // namespace dora_ext
