// linear_decode_nf4 on the CPU: what is unpacked of W multiplies all tokens before it leaves registers or the L1 cache,
// so that nothing of W's size is written.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../check_decode.h"
#include "faces.h"
#include "narrow.h"
#include "nf4_weight.h"

namespace dora_ext::cpu {
namespace {

// out (tokens, out) = x W^T
struct Decode {
  const Tensor& x;
  const Nf4Weight& weight;
  Tensor out;
  int64_t tokens = x.size(0), in = x.size(1), rows = out.size(1);

  // With W in registers from its codes to the products.
  template <typename X>
  void by_steps(const Nf4Product<X>& product) const {
    constexpr int64_t kRows = kNf4MostRows;
    const Tensor arranged = at::empty_like(x);
    product.arrange(data<X>(arranged), data<X>(x), tokens, in);
    const int shift = shift_of(weight.blocksize());
    at::parallel_for(0, divide_up(rows, kRows), grain(kRows * in), [&](int64_t begin, int64_t end) {
      std::vector<float> scales((kRows * in >> shift) + 2);
      for (int64_t row = begin * kRows; row < std::min(end * kRows, rows); row += kRows) {
        const int64_t count = std::min(kRows, rows - row), first = row * in, block = first >> shift;
        weight.scales(block, ((first + count * in - 1) >> shift) + 1 - block, scales.data());
        const Nf4Rows w{weight.bytes() + first / 2, first, in, shift, kNf4.value, scales.data()};
        product.multiply(data<float>(out) + row, rows, w, count, data<X>(arranged), tokens);
      }
    });
  }

  // A piece of W at a time, unpacked into the L1 cache, for all sizes and instruction sets. W is rounded to T.
  template <typename T>
  void by_pieces() const {
    // Rows of a piece must not lie a power of two apart, where they would drive one another out of the cache.
    constexpr int64_t kRows = 8, kColumns = 512, kPitch = kColumns + 16;
    const auto& loops = kernels<float>();
    const Tensor panel = pack<float>(x.t(), 1, nullptr, loops.lanes);
    at::parallel_for(0, divide_up(rows, kRows), grain(kRows * in), [&](int64_t begin, int64_t end) {
      float piece[kRows * kPitch], sums[kRows * kDecodeTokens];
      for (int64_t row = begin * kRows; row < std::min(end * kRows, rows); row += kRows) {
        const int64_t count = std::min(kRows, rows - row);
        float totals[kRows * kDecodeTokens] = {};
        for (int64_t first = 0; first < in; first += kColumns) {
          const int64_t columns = std::min(kColumns, in - first);
          for (int64_t i = 0; i < count; ++i) weight.unpack<T>((row + i) * in + first, columns, piece + i * kPitch);
          for (int64_t group = 0; group < tokens; group += loops.lanes) {  // a panel each
            const float* const part = data<float>(panel) + group * in + first * loops.lanes;
            const int64_t width = std::min(loops.lanes, tokens - group);
            loops.multiply_narrow(sums, piece, kPitch, count, columns, part, width, /*vectors=*/1);
            for (int64_t i = 0; i < count; ++i)
              for (int64_t j = 0; j < width; ++j) totals[i * tokens + group + j] += sums[i * width + j];
          }
        }
        for (int64_t i = 0; i < count * tokens; ++i) data<float>(out)[i % tokens * rows + row + i / tokens] = totals[i];
      }
    });
  }
};

// x W^T (tokens, out) in float, W rounded to `dtype`; x in float, or in the dtype that W is rounded to.
Tensor multiply_packed(const Tensor& x, const Nf4Weight& weight, int64_t out, at::ScalarType dtype) {
  const Tensor result = at::empty({x.size(0), out}, x.options().dtype(at::kFloat));
  const bool whole_steps = x.size(1) % kNf4Step == 0 && weight.blocksize() >= kNf4Step / 2;
  if (x.scalar_type() == at::kBFloat16 && whole_steps && nf4_product_bfloat16().multiply != nullptr) {
    Decode{x, weight, result}.by_steps(nf4_product_bfloat16());
    return result;
  }
  const Tensor tokens = x.to(at::kFloat);
  switch_float(dtype, [&](auto tag) {
    using T = decltype(tag);
    const Decode decode{tokens, weight, result};
    const auto& product = kernels<StoredAs<T>>().nf4_product;
    if (whole_steps && product.multiply != nullptr) {
      decode.by_steps(product);
    } else {
      decode.template by_pieces<T>();
    }
  });
  return result;
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
  const auto to = x.scalar_type();
  const Tensor h = multiply_narrow(x.to(at::kFloat), in_dtype(lora_A, at::kFloat).t(), 1);
  const Tensor y = multiply_packed(x.contiguous(), weight, shape[0], is_half(to) ? to : dtype);
  compose_into(y, y, h, lora_B, gain, bias, scaling, /*delta=*/false, /*channels_first=*/false);
  return {in_dtype(y, to), in_dtype(h, to)};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("linear_decode_nf4", linear_decode_nf4);
}

}  // namespace dora_ext::cpu
