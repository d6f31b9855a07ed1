// Products of a wide matrix and a narrow one, for linear.cpp. Float or double, any strides; r is a rank.
#pragma once

#include <ATen/core/Tensor.h>

namespace dora_ext::cpu {

// scaling * wide (rows, columns) narrow (columns, r)
at::Tensor multiply_narrow(const at::Tensor& wide, const at::Tensor& narrow, double scaling);

// narrow^T wide, (r, columns), of narrow (rows, r) and wide (rows, columns)
at::Tensor multiply_transposed_narrow(const at::Tensor& narrow, const at::Tensor& wide);

// scaling * t^T, (columns, r), of t (r, columns), contiguous: several times as fast as aten::copy_
at::Tensor transposed(const at::Tensor& t, double scaling);

}  // namespace dora_ext::cpu
