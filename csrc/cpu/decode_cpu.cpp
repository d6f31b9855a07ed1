// linear_decode_nf4 on the CPU: a piece of W is unpacked at a time and multiplies all tokens before it leaves the L1
// cache, so that nothing of W's size is written.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "../check_decode.h"
#include "faces.h"
#include "narrow.h"
#include "nf4_weight.h"

namespace dora_ext::cpu {
namespace {

// x W^T (tokens, out), whose values have been rounded to T.
template <typename T>
Tensor multiply_packed(const Tensor& x, const Nf4Weight& weight, int64_t out) {
  // A piece of W; its rows must not lie a power of two apart, where they would drive one another out of the L1 cache.
  constexpr int64_t kRows = 8, kColumns = 512, kPitch = kColumns + 16;
  const auto& loops = kernels<float>();
  const int64_t tokens = x.size(0), in = x.size(1);
  const Tensor panel = pack<float>(x.t(), 1, nullptr, loops.lanes), result = at::zeros({out, tokens}, x.options());
  at::parallel_for(0, divide_up(out, kRows), grain(kRows * in), [&](int64_t begin, int64_t end) {
    float piece[kRows * kPitch], sums[kRows * kDecodeTokens];
    for (int64_t row = begin * kRows; row < std::min(end * kRows, out); row += kRows) {
      const int64_t rows = std::min(kRows, out - row);
      float* const to = data<float>(result) + row * tokens;
      for (int64_t first = 0; first < in; first += kColumns) {
        const int64_t columns = std::min(kColumns, in - first);
        for (int64_t i = 0; i < rows; ++i) weight.unpack<T>((row + i) * in + first, columns, piece + i * kPitch);
        loops.multiply_narrow(sums, piece, kPitch, rows, columns, data<float>(panel) + first * loops.lanes, tokens,
                              /*vectors=*/1);
        for (int64_t i = 0; i < rows * tokens; ++i) to[i] += sums[i];
      }
    }
  });
  return result.t().contiguous();
}

std::tuple<Tensor, Tensor> linear_decode_nf4(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                             int64_t blocksize, at::IntArrayRef shape, at::ScalarType dtype,
                                             const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                                             const OptionalTensor& offset, int64_t nested_blocksize,
                                             const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                                             const OptionalTensor& bias, double scaling) {
  check_linear_decode_nf4(x, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset,
                          nested_blocksize, lora_A, lora_B, gain, bias, scaling);
  const Nf4Weight weight(packed, absmax, blocksize, nested_absmax, nested_code, offset, nested_blocksize);
  const Tensor h = multiply_narrow(x, in_dtype(lora_A, at::kFloat).t(), 1);
  Tensor y;
  switch_float(dtype, [&](auto tag) { y = multiply_packed<decltype(tag)>(x, weight, shape[0]); });
  compose_into(y, y, h, lora_B, gain, bias, scaling, /*delta=*/false, /*channels_first=*/false);
  return {y, h};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("linear_decode_nf4", linear_decode_nf4);
}

}  // namespace dora_ext::cpu
