// n = |W + s B A| and g = m / n of a W packed in NF4, on the CPU: W exists a few rows at a time, in the L2 cache.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "faces.h"
#include "nf4_weight.h"
#include "norm_rows.h"

namespace dora_ext::cpu {
namespace {

// Pieces of W, as float, with the values that dequantize_nf4 gives in T.
template <typename T>
struct PackedRows {
  static constexpr int64_t kRows = 16, kColumns = 4096, kScratch = kRows * kColumns;
  const Nf4Weight& weight;
  int64_t in, columns = kColumns, ld = kColumns;

  const float* operator()(float* scratch, int64_t row, int64_t rows, int64_t first, int64_t width) const {
    for (int64_t i = 0; i < rows; ++i) weight.unpack<T>((row + i) * in + first, width, scratch + i * ld);
    return scratch;
  }
};

void norm_into(Tensor& n, const Nf4Weight& weight, at::ScalarType dtype, const Tensor& lora_A, const Tensor& lora_B,
               double scaling) {
  const Tensor A = lora_A.to(at::kFloat), B = lora_B.to(at::kFloat);
  switch_float(dtype, [&](auto tag) {
    norm_by_row<float>(PackedRows<decltype(tag)>{weight, lora_A.size(1)}, A, B, scaling, n);
  });
}

std::tuple<Tensor, Tensor> norm_nf4(const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                    at::IntArrayRef shape, at::ScalarType dtype, const OptionalTensor& nested_absmax,
                                    const OptionalTensor& nested_code, const OptionalTensor& offset,
                                    int64_t nested_blocksize, const Tensor& lora_A, const Tensor& lora_B,
                                    const Tensor& magnitude, double scaling) {
  check_norm_nf4("dora_ext::norm_nf4", packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset,
                 nested_blocksize, lora_A, lora_B, magnitude, scaling);
  const Nf4Weight weight(packed, absmax, blocksize, nested_absmax, nested_code, offset, nested_blocksize);
  Tensor n = at::empty({lora_B.size(0)}, packed.options().dtype(at::kFloat));
  norm_into(n, weight, dtype, lora_A, lora_B, scaling);
  return {n, gain_of(magnitude, n)};
}

// The packed bytes row by row; where rows begin inside a byte, as one row, of which the sample is the whole.
Tensor byte_rows(const Tensor& packed, int64_t out) {
  const bool whole = out > 0 && packed.numel() % out == 0;
  return packed.reshape({whole ? out : 1, whole ? packed.numel() / out : packed.numel()});
}

std::tuple<Tensor, Tensor> norm_nf4_cached(const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                           at::IntArrayRef shape, at::ScalarType dtype,
                                           const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                                           const OptionalTensor& offset, int64_t nested_blocksize, const Tensor& lora_A,
                                           const Tensor& lora_B, const Tensor& magnitude, double scaling,
                                           Tensor& cached, Tensor& fingerprint, int64_t epoch) {
  const char* op = "dora_ext::norm_nf4_cached";
  check_norm_nf4(op, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                 lora_A, lora_B, magnitude, scaling);
  check_cached(op, cached, fingerprint, packed, at::kFloat, lora_B.size(0));
  Fingerprint now;
  const double settings[] = {scaling,
                             static_cast<double>(dtype),
                             static_cast<double>(blocksize),
                             static_cast<double>(nested_blocksize),
                             static_cast<double>(shape[0]),
                             static_cast<double>(epoch)};
  now.add_bytes(settings, sizeof(settings));
  for (const Tensor& t : {lora_A, lora_B, absmax}) now.add(t);
  for (const OptionalTensor& t : {nested_absmax, nested_code, offset})
    if (t) now.add(*t);
  now.add_sample(byte_rows(packed, shape[0]));
  return recall(now, magnitude, cached, fingerprint, [&] {
    const Nf4Weight weight(packed, absmax, blocksize, nested_absmax, nested_code, offset, nested_blocksize);
    norm_into(cached, weight, dtype, lora_A, lora_B, scaling);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("norm_nf4", norm_nf4);
  m.impl("norm_nf4_cached", norm_nf4_cached);
}

}  // namespace dora_ext::cpu
