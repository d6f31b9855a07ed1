// The checks of the decode ops, and the question that comes before: whether the kernel takes a layer at all.
#pragma once

#include "aligned.h"
#include "check.h"
#include "decode.h"

namespace dora_ext {

inline bool decode_takes(const Tensor& x, const Tensor& stored) {
  return x.is_cuda() && is_half(x.scalar_type()) && stored.is_contiguous() && lies_on(stored, 16);
}

// x (tokens, in), weight (out, in).
inline bool decode_fits(const Tensor& x, const Tensor& weight) {
  return decode_takes(x, weight) && x.scalar_type() == weight.scalar_type() &&
         decode_fits_sizes(x.size(0), x.size(1), weight.size(0));
}

// Weights of any other `dtype` than float32 and x's are left out where x is in half precision: their values are rounded
// twice elsewhere. On the CPU all else does, if tokens are few; on CUDA rows of packed weights have whole groups of 64
// columns with one scale each: blocks of 32 are left out.
inline bool decode_nf4_fits(const Tensor& x, const Tensor& packed, int64_t blocksize, at::IntArrayRef shape,
                            at::ScalarType dtype) {
  const bool rounded_once = is_half(x.scalar_type()) && (dtype == at::kFloat || dtype == x.scalar_type());
  if (x.is_cpu()) {
    return (x.scalar_type() == at::kFloat || rounded_once) && packed.is_contiguous() && shape.size() == 2 &&
           x.numel() > 0 && x.size(1) == shape[1] && x.size(0) <= kDecodeTokens;
  }
  return decode_takes(x, packed) && rounded_once && shape.size() == 2 &&
         decode_nf4_fits_sizes(x.size(0), x.size(1), shape[0], blocksize);
}

inline void check_decode_fits(const char* op, bool fits, const Tensor& x) {
  TORCH_CHECK_VALUE(
      fits, op,
      ": expected what decode_fits (csrc/check_decode.h) accepts: 1 to 8 tokens, on CUDA in bfloat16 or float16, "
      "and rows of a contiguous weight of whole pieces: 16 bytes, or 64 weights packed in NF4; on the CPU W packed; "
      "got x of shape ",
      text(x.sizes()), " and ", x.scalar_type());
}

// x, the adapter, gain and bias beside a W of `shape`, (out, in), that `weight` holds.
inline void check_decode_operands(const char* op, const Tensor& x, at::IntArrayRef shape, const Tensor& weight,
                                  const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                                  const OptionalTensor& bias, double scaling) {
  check_float(op, "x", x);
  check_factors(op, shape, weight, lora_A, lora_B, scaling, /*transposed=*/false);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == shape[1], op, ": x: expected shape (tokens, ", text(shape[1]),
                    ") for weight of shape ", text(shape), ", got ", text(x.sizes()));
  check_device(op, "x", x, "weight", weight);
  check_feature(op, "gain", gain, shape[0], weight);
  if (bias) check_feature(op, "bias", *bias, shape[0], weight);
}

inline void check_linear_decode(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                const Tensor& gain, const OptionalTensor& bias, double scaling) {
  const char* op = "dora_ext::linear_decode";
  check_float(op, "weight", weight);
  check_dim(op, "weight", weight, 2);
  check_decode_operands(op, x, weight.sizes(), weight, lora_A, lora_B, gain, bias, scaling);
  TORCH_CHECK_TYPE(x.scalar_type() == weight.scalar_type(), op, ": x: expected the dtype of weight, ",
                   weight.scalar_type(), ", got ", x.scalar_type());
  check_decode_fits(op, decode_fits(x, weight), x);
}

inline void check_linear_decode_nf4(const Tensor& x, const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                    at::IntArrayRef shape, at::ScalarType dtype, const OptionalTensor& nested_absmax,
                                    const OptionalTensor& nested_code, const OptionalTensor& offset,
                                    int64_t nested_blocksize, const Tensor& lora_A, const Tensor& lora_B,
                                    const Tensor& gain, const OptionalTensor& bias, double scaling) {
  const char* op = "dora_ext::linear_decode_nf4";
  check_nf4(op, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize);
  TORCH_CHECK_VALUE(shape.size() == 2, op, ": shape: expected (out, in), got ", text(shape));
  check_decode_operands(op, x, shape, packed, lora_A, lora_B, gain, bias, scaling);
  check_decode_fits(op, decode_nf4_fits(x, packed, blocksize, shape, dtype), x);
}

}  // namespace dora_ext
