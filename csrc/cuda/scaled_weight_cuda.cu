// scaled_weight and scaled_weight_nf4 on CUDA: fp16 and bf16 up to rank 64 by a kernel, the rest by library products.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../check.h"
#include "../inside_op.h"
#include "../scaled_weight.h"
#include "launch.h"
#include "nf4.cuh"
#include "nf4_operands.h"
#include "scaled_weight.cuh"

namespace dora_ext {
namespace {

Tensor run_dense(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain, double scaling,
                 bool transposed) {
  const auto dtype = weight.scalar_type();
  const int64_t out = lora_B.size(0), in = lora_A.size(1);
  if (weight.numel() == 0) return at::empty(weight.sizes(), weight.options());
  if (weight.element_size() == 2 && weight.size(1) % 8 == 0) {
    const Tensor w = aligned(weight, 16), b = lora_B.to(dtype).contiguous(), g = gain.contiguous();
    Tensor a = lora_A.to(dtype);
    if (in % 8 != 0) a = at::constant_pad_nd(a, {0, 8 - in % 8});
    a = aligned(a, 16);
    Tensor v = at::empty(w.sizes(), w.options());
    bool launched = false;
    switch_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (sizeof(T) == 2) {
        const NormProblem<T> problem{data<T>(w),
                                     data<T>(a),
                                     data<T>(b),
                                     out,
                                     in,
                                     a.size(1),
                                     static_cast<int>(a.size(0)),
                                     static_cast<float>(scaling),
                                     nullptr,
                                     nullptr};
        const auto launch = transposed ? launch_scaled_weight<true, T> : launch_scaled_weight<false, T>;
        launched = launch(problem, feature_vector(g), mutable_data<T>(v), multiprocessors(), shared_bytes_per_block(),
                          current_stream());
      }
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (launched) return v;
  }
  InsideOp guard;
  return compose_scaled_weight(weight, lora_A, lora_B, gain, scaling, transposed);
}

Tensor scaled_weight_cuda(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                          double scaling, bool transposed) {
  check_scaled_weight(weight, lora_A, lora_B, gain, scaling, transposed);
  const c10::cuda::CUDAGuard guard(weight.device());
  return run_dense(weight, lora_A, lora_B, gain, scaling, transposed);
}

Tensor scaled_weight_nf4_cuda(const Tensor& packed, const Tensor& absmax, int64_t blocksize, at::IntArrayRef shape,
                              at::ScalarType dtype, const OptionalTensor& nested_absmax,
                              const OptionalTensor& nested_code, const OptionalTensor& offset, int64_t nested_blocksize,
                              const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain, double scaling) {
  check_scaled_weight_nf4(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                          lora_A, lora_B, gain, scaling);
  const c10::cuda::CUDAGuard guard(packed.device());
  const Nf4Operands operands(packed, absmax, nested_absmax, nested_code, offset, nested_blocksize);
  const int64_t out = shape[0], in = shape[1];
  const int block_shift = shift_of(blocksize), group_shift = group_shift_of(in, block_shift);
  Tensor v = at::empty(shape, packed.options().dtype(dtype));
  if (v.numel() == 0) return v;
  bool launched = false;
  switch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      if (group_shift < 5) return;
      const Tensor a = aligned(lora_A.to(dtype), 16), b = lora_B.to(dtype).contiguous(), g = gain.contiguous();
      const NormProblem<T> problem{
          nullptr, data<T>(a), data<T>(b), out, in, in, static_cast<int>(a.size(0)), static_cast<float>(scaling),
          nullptr, nullptr};
      launched = launch_scaled_weight_nf4<T>(problem, {operands.bytes(), operands.scales, block_shift, group_shift},
                                             feature_vector(g), mutable_data<T>(v), multiprocessors(),
                                             shared_bytes_per_block(), current_stream());
    }
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (launched) return v;
  static auto dequantize =
      find_op<Tensor(const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef, at::ScalarType, const OptionalTensor&,
                     const OptionalTensor&, const OptionalTensor&, int64_t)>("dora_ext::dequantize_nf4");
  InsideOp inside;
  const Tensor weight = dequantize.call(packed, absmax, blocksize, c10::fromIntArrayRefSlow(shape), dtype,
                                        nested_absmax, nested_code, offset, nested_blocksize);
  return run_dense(weight, lora_A, lora_B, gain, scaling, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("scaled_weight", &scaled_weight_cuda);
  m.impl("scaled_weight_nf4", &scaled_weight_nf4_cuda);
}

}  // namespace dora_ext
