// Products of two large matrices on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace dora_ext::cpu {

// left (rows, k) right (k, columns) + bias (columns,), in their dtype; torch's, or our own where that is faster.
at::Tensor multiply(const at::Tensor& left, const at::Tensor& right,
                    const std::optional<at::Tensor>& bias = std::nullopt);

}  // namespace dora_ext::cpu
