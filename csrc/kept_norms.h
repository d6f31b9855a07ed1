// What norm_cached and its kin keep between calls.
#pragma once

#include <ATen/core/Tensor.h>

namespace dora_ext {

struct KeptNorms {
  at::Tensor &cached, &fingerprint;
  int64_t epoch;
};

}  // namespace dora_ext
