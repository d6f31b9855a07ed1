// NF4 on CUDA: checks, device guard, alignment, launches.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../check.h"
#include "launch.h"
#include "nf4.cuh"
#include "nf4_operands.h"
#include "nf4_quantize.cuh"

namespace dora_ext {
namespace {

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& x, int64_t blocksize) {
  check_quantize_nf4(x, blocksize);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_ = aligned(x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x, 16);
  const int64_t numel = x_.numel();
  Tensor packed = at::empty({(numel + 1) / 2}, x_.options().dtype(at::kByte));
  Tensor absmax = at::empty({(numel + blocksize - 1) / blocksize}, x_.options().dtype(at::kFloat));
  switch_dtype(x_.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, double>) {
      launch_quantize_nf4<T>(data<T>(x_), blocksize, numel, mutable_data<uint8_t>(packed), mutable_data<float>(absmax),
                             current_stream());
    }
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& code, int64_t blocksize) {
  check_quantize_absmax(absmax, code, blocksize);
  const c10::cuda::CUDAGuard guard(absmax.device());
  const Tensor absmax_ = absmax.contiguous(), code_ = code.contiguous();
  const int64_t numel = absmax_.numel();
  Tensor codes = at::empty({numel}, absmax_.options().dtype(at::kByte));
  Tensor nested = at::empty({(numel + blocksize - 1) / blocksize}, absmax_.options());
  launch_quantize_absmax(data<float>(absmax_), data<float>(code_), blocksize, numel, mutable_data<uint8_t>(codes),
                         mutable_data<float>(nested), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {codes, nested};
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, int64_t blocksize, at::IntArrayRef shape,
                      at::ScalarType dtype, const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                      const OptionalTensor& offset, int64_t nested_blocksize, const OptionalTensor& row_gain) {
  check_dequantize_nf4(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                       row_gain);
  const c10::cuda::CUDAGuard guard(packed.device());
  const Nf4Operands weight(packed, absmax, nested_absmax, nested_code, offset, nested_blocksize);
  Tensor out = at::empty(shape, packed.options().dtype(dtype));
  const Tensor gain = row_gain ? row_gain->contiguous() : Tensor();
  const int64_t rows = shape.empty() ? 1 : std::max<int64_t>(1, shape[0]);
  const RowGain row_gain_{row_gain ? data<float>(gain) : nullptr, out.numel() / rows, out.numel() <= UINT32_MAX};
  switch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, double>) {
      launch_dequantize_nf4<T>(weight.bytes(), weight.scales, blocksize, out.numel(), mutable_data<T>(out), row_gain_,
                               current_stream());
    }
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("quantize_nf4", &quantize_nf4);
  m.impl("quantize_absmax", &quantize_absmax);
  m.impl("dequantize_nf4", &dequantize_nf4);
}

}  // namespace dora_ext
