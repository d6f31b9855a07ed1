// A packed weight as the ops take it, made ready for kernels: contiguous, aligned, and alive until the launch.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "../check.h"
#include "../nf4.h"
#include "launch.h"

namespace dora_ext {

struct Nf4Operands {
  Tensor packed, absmax, nested, code, offset;
  Nf4Scales scales;

  Nf4Operands(const Tensor& packed_, const Tensor& absmax_, const OptionalTensor& nested_absmax,
              const OptionalTensor& nested_code, const OptionalTensor& offset_, int64_t nested_blocksize)
      : packed(aligned(packed_, 16)),
        absmax(absmax_.contiguous()),
        nested(contiguous(nested_absmax)),
        code(contiguous(nested_code)),
        offset(contiguous(offset_)),
        scales{absmax.const_data_ptr(), pointer(nested), pointer(code), pointer(offset), shift_of(nested_blocksize)} {}

  const uint8_t* bytes() const { return data<uint8_t>(packed); }

 private:
  static Tensor contiguous(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }
  static const float* pointer(const Tensor& t) { return t.defined() ? data<float>(t) : nullptr; }
};

}  // namespace dora_ext
