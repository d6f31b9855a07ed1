// Products of large matrices, the library's; and of a wide matrix and a narrow one, of a rank's width: our own loops on
// the CPU, else the library's.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "aligned.h"
#include "check.h"
#include "cpu/narrow.h"
#include "cpu/product.h"

namespace dora_ext {

// Where our own loops for narrow matrices beat the library.
inline bool has_cpu_loops(const at::Tensor& t) {
  return t.is_cpu() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
}

// left (rows, k) right (k, columns)
inline at::Tensor product(const at::Tensor& left, const at::Tensor& right) {
  return left.is_cpu() ? cpu::multiply(left, right) : at::mm(left, right);
}

// scaling * wide (tokens, features) narrow (features, r)
inline at::Tensor product_with_narrow(const at::Tensor& wide, const at::Tensor& narrow, double scaling = 1) {
  if (has_cpu_loops(wide)) return cpu::multiply_narrow(wide, narrow, scaling);
  if (scaling == 1) return at::mm(wide, narrow);
  return at::empty({wide.size(0), narrow.size(1)}, wide.options()).addmm_(wide, narrow, /*beta=*/0, scaling);
}

// left right, for the gradient of a parameter: in the parameter's dtype, and on CUDA not rounded to half precision on
// the way there. (The CPU has no product with that result; it rounds once.)
inline at::Tensor product_for(const at::Tensor& parameter, const at::Tensor& left, const at::Tensor& right) {
  const auto dtype = parameter.scalar_type();
  if (left.is_cuda() && is_half(left.scalar_type()) && dtype == at::kFloat) return at::mm(left, right, dtype);
  return in_dtype(at::mm(left, right), dtype);
}

// dA = P^T x
inline at::Tensor grad_of_A(const at::Tensor& lora_A, const at::Tensor& P, const at::Tensor& x) {
  if (has_cpu_loops(x)) return in_dtype(cpu::multiply_transposed_narrow(P, x), lora_A.scalar_type());
  return product_for(lora_A, P.t(), x);
}

// dB = s G^T h
inline at::Tensor grad_of_B(const at::Tensor& lora_B, const at::Tensor& G, const at::Tensor& h, double scaling) {
  if (has_cpu_loops(G)) {
    return in_dtype(cpu::transposed(cpu::multiply_transposed_narrow(h, G), scaling), lora_B.scalar_type());
  }
  at::Tensor grad_B = product_for(lora_B, G.t(), h);
  if (scaling != 1) grad_B.mul_(scaling);
  return grad_B;
}

}  // namespace dora_ext
