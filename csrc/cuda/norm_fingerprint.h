// The fingerprint of norm_fingerprint.cuh for whoever makes the norms elsewhere.
#pragma once

#include <ATen/core/Tensor.h>

namespace dora_ext {

// Leaves in `fingerprint` (int64[4]) whether norms of W (out, in), A and B are stale, as norm_cached does. All
// contiguous and in W's dtype.
void update_fingerprint(const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling,
                        int64_t epoch, at::Tensor& fingerprint);

}  // namespace dora_ext
