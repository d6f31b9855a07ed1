// A packed NF4 weight on the CPU, unpacked a stretch at a time: for dequantize_nf4 and for the norm.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../check.h"
#include "../nf4.h"
#include "kernels.h"

namespace dora_ext {

// f(T()) for the dtypes that NF4 unpacks to.
template <typename F>
void switch_float(at::ScalarType t, const F& f) {
  if (t == at::kFloat) return f(float{});
  if (t == at::kHalf) return f(at::Half{});
  f(at::BFloat16{});
}

// T as the loops know it.
template <typename T>
using StoredAs = std::conditional_t<std::is_same_v<T, float>, float,
                                    std::conditional_t<std::is_same_v<T, at::Half>, cpu::Float16, cpu::BFloat16>>;

class Nf4Weight {
 public:
  Nf4Weight(const Tensor& packed, const Tensor& absmax, int64_t blocksize, const OptionalTensor& nested_absmax,
            const OptionalTensor& nested_code, const OptionalTensor& offset, int64_t nested_blocksize)
      : packed_(packed.contiguous()),
        absmax_(absmax.contiguous()),
        nested_(contiguous(nested_absmax)),
        code_(contiguous(nested_code)),
        offset_(contiguous(offset)),
        blocksize_(blocksize),
        bytes_(packed_.const_data_ptr<uint8_t>()),
        scales_{absmax_.const_data_ptr(), pointer(nested_), pointer(code_), pointer(offset_),
                shift_of(nested_blocksize)} {}

  // Weights begin ... begin + count of the flattened tensor, rounded to T; Out: T or float.
  template <typename T, typename Out>
  void unpack(int64_t begin, int64_t count, Out* out) const {
    const auto& loops = cpu::kernels<StoredAs<T>>();
    constexpr int64_t kMostBlocks = 64;
    float scales[kMostBlocks];
    for (const int64_t end = begin + count; begin < end;) {
      // Whole blocks, or a piece of one.
      const int64_t block = begin / blocksize_, whole = begin == block * blocksize_ ? (end - begin) / blocksize_ : 0;
      const int64_t blocks = std::clamp<int64_t>(whole, 1, kMostBlocks);
      const int64_t stop = whole > 0 ? begin + blocks * blocksize_ : std::min(end, (block + 1) * blocksize_);
      for (int64_t i = 0; i < blocks; ++i) scales[i] = scale_of(block + i);
      const auto one = [&](int code) { return static_cast<Out>(static_cast<T>(kNf4.value[code] * scales[0])); };
      if (begin % 2) *out++ = one(bytes_[begin++ / 2] & 15);
      const int64_t even = (stop - begin) / blocks / 2 * 2;
      if constexpr (std::is_same_v<Out, T>) {
        loops.unpack_nf4(reinterpret_cast<StoredAs<T>*>(out), bytes_ + begin / 2, blocks, even, kNf4.value, scales);
      } else {
        loops.unpack_nf4_wide(out, bytes_ + begin / 2, blocks, even, kNf4.value, scales);
      }
      out += blocks * even;
      begin += blocks * even;
      if (begin < stop) *out++ = one(bytes_[begin++ / 2] >> 4);
    }
  }

  // The scales of `count` blocks.
  void scales(int64_t first, int64_t count, float* out) const {
    for (int64_t i = 0; i < count; ++i) out[i] = scale_of(first + i);
  }
  const uint8_t* bytes() const { return bytes_; }
  int64_t blocksize() const { return blocksize_; }

 private:
  static Tensor contiguous(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }
  static const float* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

  float scale_of(int64_t block) const {
    const Nf4Scales& s = scales_;
    if (!s.nested_absmax) return static_cast<const float*>(s.absmax)[block];
    // The product of two floats is exact in a double, so that it is rounded once and never fused with the sum.
    const double code = s.code[static_cast<const uint8_t*>(s.absmax)[block]];
    const float product = static_cast<float>(code * s.nested_absmax[block >> s.nested_shift]);
    return s.offset ? product + *s.offset : product;
  }

  Tensor packed_, absmax_, nested_, code_, offset_;  // hold the memory that the rest points into
  int64_t blocksize_;
  const uint8_t* bytes_;
  Nf4Scales scales_;
};

}  // namespace dora_ext
