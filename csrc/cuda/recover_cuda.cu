// magnitude_grad_recover_ and magnitude_grad_recover_nf4_ on CUDA. The kernel: recover.cuh.
#include <torch/library.h>

#include "../check.h"
#include "launch.h"
#include "nf4_operands.h"
#include "recover.cuh"

namespace dora_ext {
namespace {

// make_weight(TypeTag<T>{}): W in T, which x has. beside: the launch before this one made neither norm nor gain.
template <typename MakeWeight>
void recover(Tensor& grad_magnitude, const Tensor& grad_y, const Tensor& x, const Tensor& h, const Tensor& lora_B,
             const Tensor& norm, const Tensor& gain, double scaling, bool beside, MakeWeight&& make_weight) {
  const auto dtype = x.scalar_type(), accumulate = accumulate_type(dtype);
  // The gradient and the weight are read by their strides: in nearly every call they are not read at all.
  const Tensor d = in_dtype(grad_y, dtype), x_ = x.contiguous(), h_ = h.contiguous(), B = lora_B.contiguous();
  const Tensor n = in_dtype(norm, accumulate).contiguous(), g = in_dtype(gain, accumulate).contiguous();
  beside = beside && n.is_same(norm) && g.is_same(gain);
  switch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    RecoverProblem<T, decltype(make_weight(tag))> p{};
    p.grad_magnitude = feature_result(grad_magnitude);
    p.grad_magnitude_stride = grad_magnitude.stride(0);
    p.grad = data<T>(d);
    p.grad_token_stride = d.stride(0);
    p.grad_feature_stride = d.stride(1);
    p.x = data<T>(x_);
    p.h = data<T>(h_);
    p.weight = make_weight(tag);
    p.lora_B = feature_vector(B);
    p.norm = data<Acc>(n);
    p.gain = data<Acc>(g);
    p.tokens = d.size(0);
    p.out = d.size(1);
    p.in = x_.size(1);
    p.rank = static_cast<int>(h_.size(1));
    p.scaling = static_cast<Acc>(scaling);
    launch_magnitude_grad_recover(p, multiprocessors(), beside, current_stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void magnitude_grad_recover_cuda_(Tensor& grad_magnitude, const Tensor& grad_y, const Tensor& x, const Tensor& h,
                                  const Tensor& weight, const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                                  double scaling, bool transposed, bool beside) {
  check_magnitude_grad_recover(grad_magnitude, grad_y, x, h, weight, lora_B, norm, gain, scaling, transposed);
  const c10::cuda::CUDAGuard guard(grad_y.device());
  recover(grad_magnitude, grad_y, x, h, lora_B, norm, gain, scaling, beside, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return StridedWeight<T>{data<T>(weight), weight.stride(transposed ? 1 : 0), weight.stride(transposed ? 0 : 1)};
  });
}

void magnitude_grad_recover_nf4_cuda_(Tensor& grad_magnitude, const Tensor& grad_y, const Tensor& x, const Tensor& h,
                                      const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                      at::IntArrayRef shape, at::ScalarType dtype, const OptionalTensor& nested_absmax,
                                      const OptionalTensor& nested_code, const OptionalTensor& offset,
                                      int64_t nested_blocksize, const Tensor& lora_B, const Tensor& norm,
                                      const Tensor& gain, double scaling, bool beside) {
  const char* op = "dora_ext::magnitude_grad_recover_nf4_";
  check_nf4(op, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize);
  TORCH_CHECK_VALUE(shape.size() == 2, op, ": shape: expected (out, in), got ", text(shape));
  check_recover_operands(op, grad_magnitude, grad_y, x, h, shape, packed, lora_B, norm, gain, scaling);
  const c10::cuda::CUDAGuard guard(grad_y.device());
  const Nf4Operands weight(packed, absmax, nested_absmax, nested_code, offset, nested_blocksize);
  const Dtype own = dtype == at::kHalf ? Dtype::kHalf : dtype == at::kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat;
  recover(grad_magnitude, grad_y, x, h, lora_B, norm, gain, scaling, beside, [&](auto tag) {
    return PackedWeight<typename decltype(tag)::type>{weight.bytes(), weight.scales, shift_of(blocksize), shape[1],
                                                      own};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("magnitude_grad_recover_", &magnitude_grad_recover_cuda_);
  m.impl("magnitude_grad_recover_nf4_", &magnitude_grad_recover_nf4_cuda_);
}

}  // namespace dora_ext
