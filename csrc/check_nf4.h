// The part of check.h, which includes this, that knows NF4.
#pragma once

#include "check.h"

namespace dora_ext {

inline void check_quantize_nf4(const Tensor& x, int64_t blocksize) {
  check_float("dora_ext::quantize_nf4", "x", x);
  TORCH_CHECK_VALUE(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0,
                    "dora_ext::quantize_nf4: blocksize: expected a power of two from 32 to 4096, got ",
                    text(blocksize));
}

// A packed weight and what it is to become.
inline void check_nf4(const char* op, const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                      at::IntArrayRef shape, at::ScalarType dtype, const OptionalTensor& nested_absmax,
                      const OptionalTensor& nested_code, const OptionalTensor& offset, int64_t nested_blocksize) {
  TORCH_CHECK_VALUE(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op,
                    ": blocksize: expected a power of two from 32 to 4096, got ", text(blocksize));
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op,
                   ": dtype: expected bfloat16, float16 or float32, got ", dtype);
  int64_t numel = 1;
  for (const int64_t s : shape) {
    TORCH_CHECK_VALUE(s >= 0, op, ": shape: expected sizes of at least 0, got ", text(shape));
    numel *= s;
  }
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, op, ": packed: expected uint8, got ", packed.scalar_type());
  TORCH_CHECK_VALUE(packed.numel() == (numel + 1) / 2, op, ": packed: expected ", text((numel + 1) / 2),
                    " bytes for shape ", text(shape), ", got ", text(packed.numel()));
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  TORCH_CHECK_VALUE(absmax.numel() == blocks, op, ": absmax: expected ", text(blocks), " values, one per ",
                    text(blocksize), " weights, got ", text(absmax.numel()));
  check_device(op, "absmax", absmax, "packed", packed);
  if (!nested_absmax) {
    TORCH_CHECK_TYPE(absmax.scalar_type() == at::kFloat, op, ": absmax: expected float32, got ", absmax.scalar_type());
    return;
  }
  TORCH_CHECK_TYPE(absmax.scalar_type() == at::kByte, op, ": absmax: expected uint8 with nested_absmax, got ",
                   absmax.scalar_type());
  TORCH_CHECK_VALUE(nested_blocksize > 0 && (nested_blocksize & (nested_blocksize - 1)) == 0, op,
                    ": nested_blocksize: expected a power of two, got ", text(nested_blocksize));
  const int64_t nested = (blocks + nested_blocksize - 1) / nested_blocksize;
  TORCH_CHECK_VALUE(nested_absmax->scalar_type() == at::kFloat && nested_absmax->numel() == nested, op,
                    ": nested_absmax: expected ", text(nested), " float32 values, got ", text(nested_absmax->numel()),
                    " of ", nested_absmax->scalar_type());
  TORCH_CHECK_VALUE(nested_code && nested_code->scalar_type() == at::kFloat && nested_code->numel() == 256, op,
                    ": nested_code: expected 256 float32 values with nested_absmax");
  check_device(op, "nested_absmax", *nested_absmax, "packed", packed);
  check_device(op, "nested_code", *nested_code, "packed", packed);
  if (!offset) return;
  TORCH_CHECK_VALUE(offset->scalar_type() == at::kFloat && offset->numel() == 1, op,
                    ": offset: expected one float32 value, got ", text(offset->numel()), " of ", offset->scalar_type());
  check_device(op, "offset", *offset, "packed", packed);
}

inline void check_dequantize_nf4(const Tensor& packed, const Tensor& absmax, int64_t blocksize, at::IntArrayRef shape,
                                 at::ScalarType dtype, const OptionalTensor& nested_absmax,
                                 const OptionalTensor& nested_code, const OptionalTensor& offset,
                                 int64_t nested_blocksize, const OptionalTensor& row_gain) {
  const char* op = "dora_ext::dequantize_nf4";
  check_nf4(op, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize);
  if (!row_gain) return;
  TORCH_CHECK_VALUE(!shape.empty(), op, ": row_gain: expected None for a shape without rows");
  TORCH_CHECK_TYPE(row_gain->scalar_type() == at::kFloat, op, ": row_gain: expected float32, got ",
                   row_gain->scalar_type());
  check_feature(op, "row_gain", *row_gain, shape[0], packed);
}

inline void check_norm_nf4(const char* op, const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                           at::IntArrayRef shape, at::ScalarType dtype, const OptionalTensor& nested_absmax,
                           const OptionalTensor& nested_code, const OptionalTensor& offset, int64_t nested_blocksize,
                           const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude, double scaling) {
  check_nf4(op, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize);
  TORCH_CHECK_VALUE(shape.size() == 2, op, ": shape: expected (out, in), got ", text(shape));
  check_factors(op, shape, packed, lora_A, lora_B, scaling, /*transposed=*/false);
  check_feature(op, "magnitude", magnitude, lora_B.size(0), packed);
}

inline void check_quantize_absmax(const Tensor& absmax, const Tensor& code, int64_t blocksize) {
  const char* op = "dora_ext::quantize_absmax";
  TORCH_CHECK_TYPE(absmax.scalar_type() == at::kFloat, op, ": absmax: expected float32, got ", absmax.scalar_type());
  check_dim(op, "absmax", absmax, 1);
  TORCH_CHECK_TYPE(code.scalar_type() == at::kFloat, op, ": code: expected float32, got ", code.scalar_type());
  check_shape(op, "code", code, {256});
  check_device(op, "code", code, "absmax", absmax);
  TORCH_CHECK_VALUE(blocksize > 0 && (blocksize & (blocksize - 1)) == 0, op,
                    ": blocksize: expected a power of two, got ", text(blocksize));
}

}  // namespace dora_ext
