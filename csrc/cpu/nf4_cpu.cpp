// NF4 on the CPU, bit for bit what bitsandbytes computes there.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "../check.h"
#include "../nf4.h"
#include "nf4_weight.h"

namespace dora_ext {
namespace {

constexpr int64_t kMaxBlock = 4096;
constexpr int64_t kGrain = 1 << 15;  // weights per task

int64_t blocks_of(int64_t numel, int64_t blocksize) {
  return (numel + blocksize - 1) / blocksize;
}

template <typename F>
void for_blocks(int64_t blocks, int64_t blocksize, const F& f) {
  at::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / blocksize), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b);
  });
}

// Largest |v|, NaN if there is one: compared as integers, where NaN is above infinity and the loop vectorises.
float largest(const float* v, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, v + i, sizeof bits);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float result;
  std::memcpy(&result, &most, sizeof result);
  return result;
}

// One block of `count` weights: x (count,) -> packed (ceil(count / 2),), absmax (1,).
template <typename T>
void quantize_block(const T* x, int64_t count, bool whole, uint8_t* packed, float* absmax) {
  float v[kMaxBlock + 1];
  uint8_t codes[kMaxBlock + 1];
  for (int64_t i = 0; i < count; ++i) v[i] = static_cast<float>(x[i]);
  const float most = largest(v, count);
  const float divisor = most < 1e-38f ? 1e-38f : most;
  // bitsandbytes multiplies by the reciprocal in whole blocks; in a last, shorter one it divides, and stores the
  // divisor.
  *absmax = whole ? most : divisor;
  const float reciprocal = 1.0f / divisor;
  for (int64_t i = 0; i < count; ++i) v[i] = whole ? v[i] * reciprocal : v[i] / divisor;
  for (int64_t i = 0; i < count; ++i) {
    int code = 0;
    for (const float t : kNf4.threshold) code += !(v[i] <= t);  // NaN counts all of them, as in torch.bucketize
    codes[i] = static_cast<uint8_t>(code);
  }
  codes[count] = kNf4Zero;
  for (int64_t i = 0; i < count; i += 2) packed[i / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
}

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& x, int64_t blocksize) {
  check_quantize_nf4(x, blocksize);
  const Tensor x_ = (x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x).contiguous();
  const int64_t numel = x_.numel(), blocks = blocks_of(numel, blocksize);
  Tensor packed = at::empty({(numel + 1) / 2}, x_.options().dtype(at::kByte));
  Tensor absmax = at::empty({blocks}, x_.options().dtype(at::kFloat));
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  float* scale = absmax.mutable_data_ptr<float>();
  switch_float(x_.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* from = x_.const_data_ptr<T>();
    for_blocks(blocks, blocksize, [&](int64_t b) {
      const int64_t start = b * blocksize, count = std::min(blocksize, numel - start);
      quantize_block(from + start, count, count == blocksize, to + start / 2, scale + b);
    });
  });
  return {packed, absmax};
}

// codes[i]: the nearest of 256 values to absmax[i] / nested_absmax[i / blocksize]. bitsandbytes first rounds the
// quotient to one of 65536 steps over [-1, 1], with one fused multiply-add; equal bits need the same detour.
std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& code, int64_t blocksize) {
  check_quantize_absmax(absmax, code, blocksize);
  const Tensor absmax_ = absmax.contiguous(), code_ = code.contiguous();
  const int64_t numel = absmax_.numel(), blocks = blocks_of(numel, blocksize);
  Tensor codes = at::empty({numel}, absmax_.options().dtype(at::kByte));
  Tensor nested = at::empty({blocks}, absmax_.options());
  const float* from = absmax_.const_data_ptr<float>();
  const float* value = code_.const_data_ptr<float>();
  uint8_t* to = codes.mutable_data_ptr<uint8_t>();
  float* scale = nested.mutable_data_ptr<float>();
  float midpoint[255];
  for (int i = 0; i < 255; ++i) midpoint[i] = 0.5f * (value[i] + value[i + 1]);
  for_blocks(blocks, blocksize, [&](int64_t b) {
    const int64_t start = b * blocksize, end = std::min(start + blocksize, numel);
    float most = 0;
    for (int64_t i = start; i < end; ++i) most = std::max(most, std::fabs(from[i]));
    scale[b] = most;
    const float reciprocal = 1.0f / most;
    for (int64_t i = start; i < end; ++i) {
      const float v = std::clamp(from[i] * reciprocal, -1.0f, 1.0f);
      const float step = std::fma((v + 1.0f) * 0.5f, 65535.0f, 0.5f);
      // Zero blocks get code 0; a NaN has no code of its own.
      const int whole = step >= 0 && most > 0 ? static_cast<int>(step) : 0;
      const float rounded = -1.0f + (2.0f * static_cast<float>(whole)) / 65535.0f;
      to[i] = static_cast<uint8_t>(std::lower_bound(midpoint, midpoint + 255, rounded) - midpoint);
    }
  });
  return {codes, nested};
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, int64_t blocksize, at::IntArrayRef shape,
                      at::ScalarType dtype, const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                      const OptionalTensor& offset, int64_t nested_blocksize, const OptionalTensor& row_gain) {
  check_dequantize_nf4(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                       row_gain);
  const Nf4Weight weight(packed, absmax, blocksize, nested_absmax, nested_code, offset, nested_blocksize);
  Tensor out = at::empty(shape, packed.options().dtype(dtype));
  const int64_t numel = out.numel();
  switch_float(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* to = out.mutable_data_ptr<T>();
    for_blocks(blocks_of(numel, blocksize), blocksize, [&](int64_t b) {
      const int64_t start = b * blocksize;
      weight.unpack<T>(start, std::min(blocksize, numel - start), to + start);
    });
  });
  if (row_gain && numel > 0) {
    const Tensor rows = out.view({shape[0], numel / shape[0]});
    at::mul_out(const_cast<Tensor&>(rows), rows, row_gain->view({-1, 1}));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("quantize_nf4", &quantize_nf4);
  m.impl("quantize_absmax", &quantize_absmax);
  m.impl("dequantize_nf4", &dequantize_nf4);
}

}  // namespace dora_ext
