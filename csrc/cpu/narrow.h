// Products of a wide matrix and a narrow one, for linear.cpp. Float or double, any strides; r is a rank.
#pragma once

#include <ATen/core/Tensor.h>

namespace dora_ext::cpu {

// scaling * wide (rows, columns) narrow (columns, r)
at::Tensor multiply_narrow(const at::Tensor& wide, const at::Tensor& narrow, double scaling);

// scaling * wide^T narrow, (columns, r), of wide (rows, columns) and narrow (rows, r)
at::Tensor multiply_transposed_narrow(const at::Tensor& wide, const at::Tensor& narrow, double scaling);

}  // namespace dora_ext::cpu
