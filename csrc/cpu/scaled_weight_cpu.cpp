// scaled_weight and scaled_weight_nf4 on the CPU: library products.
#include <torch/library.h>

#include "../inside_op.h"
#include "../scaled_weight.h"

namespace dora_ext::cpu {
namespace {

Tensor scaled_weight(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                     double scaling, bool transposed) {
  check_scaled_weight(weight, lora_A, lora_B, gain, scaling, transposed);
  InsideOp guard;
  return compose_scaled_weight(weight, lora_A, lora_B, gain, scaling, transposed);
}

Tensor scaled_weight_nf4(const Tensor& packed, const Tensor& absmax, int64_t blocksize, at::IntArrayRef shape,
                         at::ScalarType dtype, const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                         const OptionalTensor& offset, int64_t nested_blocksize, const Tensor& lora_A,
                         const Tensor& lora_B, const Tensor& gain, double scaling) {
  static auto dequantize =
      find_op<Tensor(const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef, at::ScalarType, const OptionalTensor&,
                     const OptionalTensor&, const OptionalTensor&, int64_t)>("dora_ext::dequantize_nf4");
  check_scaled_weight_nf4(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                          lora_A, lora_B, gain, scaling);
  InsideOp guard;
  const Tensor weight = dequantize.call(packed, absmax, blocksize, c10::fromIntArrayRefSlow(shape), dtype,
                                        nested_absmax, nested_code, offset, nested_blocksize);
  return compose_scaled_weight(weight, lora_A, lora_B, gain, scaling, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("scaled_weight", scaled_weight);
  m.impl("scaled_weight_nf4", scaled_weight_nf4);
}

}  // namespace dora_ext::cpu
