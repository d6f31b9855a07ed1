// n = |W + s B A| by output feature and g = m / n, on the CPU.
#define AT_PER_OPERATOR_HEADERS
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "check.h"

namespace dora_ext {
namespace {

Tensor gain_of(const Tensor& magnitude, const Tensor& n) {
  return at::where(n > 0, magnitude.to(n.scalar_type()) / n, 0.0);
}

Tensor compute_norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling, bool transposed) {
  const auto dtype = weight.scalar_type(), acc = accumulate_type(dtype);
  const Tensor W = transposed ? weight.t() : weight, A = lora_A.to(dtype).to(acc), B = lora_B.to(dtype).to(acc);
  Tensor n = at::empty({B.size(0)}, weight.options().dtype(acc));
  for (int64_t i = 0; i < n.size(0); i += 64) {
    const int64_t end = std::min(i + 64, n.size(0));
    const Tensor V = at::addmm(W.slice(0, i, end).to(acc), B.slice(0, i, end), A, 1, scaling);
    n.slice(0, i, end).copy_((V * V).sum(1).sqrt());
  }
  return n;
}

std::tuple<Tensor, Tensor> norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                const Tensor& magnitude, double scaling, bool transposed) {
  check_norm(weight, lora_A, lora_B, magnitude, scaling, transposed);
  const Tensor n = compute_norm(weight, lora_A, lora_B, scaling, transposed);
  return {n, gain_of(magnitude, n)};
}

std::tuple<Tensor, Tensor> norm_cached(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                       const Tensor& magnitude, double scaling, bool transposed, Tensor& cached,
                                       Tensor& fingerprint) {
  check_norm_cached(weight, lora_A, lora_B, magnitude, scaling, transposed, cached, fingerprint);
  cached.copy_(compute_norm(weight, lora_A, lora_B, scaling, transposed));
  ++fingerprint.data_ptr<int64_t>()[3];
  const Tensor n = cached.clone();
  return {n, gain_of(magnitude, n)};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("norm", norm);
  m.impl("norm_cached", norm_cached);
}

}  // namespace dora_ext
