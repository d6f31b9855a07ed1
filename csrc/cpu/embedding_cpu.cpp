// DoRA's embedding on the CPU: y = embed_scale * g * (W[ids] + s A[:, ids]^T B^T), and its gradients.
#define AT_PER_OPERATOR_HEADERS
#include <ATen/TensorOperators.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "check.h"

namespace dora_ext {
namespace {

Tensor embedding_forward(const Tensor& ids, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                         const Tensor& gain, double scaling, double embed_scale) {
  check_embedding("dora_ext::embedding_forward", ids, weight, lora_A, lora_B, gain, scaling);
  const auto acc = accumulate_type(weight.scalar_type());
  const int64_t vocab = weight.size(0), dim = weight.size(1), tokens = ids.numel();
  const Tensor list = ids.to(at::kLong).contiguous().view({tokens});
  const Tensor valid = list.ge(0).logical_and_(list < vocab);
  const Tensor safe = list.masked_fill(valid.logical_not(), 0);
  Tensor y = lora_A.index_select(1, safe).to(acc).t().mm(lora_B.to(acc).t()).mul_(scaling);
  y.add_(weight.index_select(0, safe)).mul_(gain.to(acc)).mul_(embed_scale);
  y.masked_fill_(valid.logical_not().unsqueeze(1), std::numeric_limits<double>::quiet_NaN());
  auto shape = ids.sizes().vec();
  shape.push_back(dim);
  return y.to(weight.scalar_type()).view(shape);
}

std::tuple<Tensor, Tensor, Tensor> embedding_backward(const Tensor& grad_y, const Tensor& ids, const Tensor& weight,
                                                      const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm,
                                                      const Tensor& gain, double scaling, double embed_scale,
                                                      int64_t padding_idx, bool scale_grad_by_freq, int64_t mask) {
  const char* op = "dora_ext::embedding_backward";
  check_embedding(op, ids, weight, lora_A, lora_B, gain, scaling);
  auto shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  check_shape(op, "grad_y", grad_y, shape);
  const auto acc = norm.scalar_type();
  const int64_t vocab = weight.size(0), dim = weight.size(1), tokens = ids.numel(), r = lora_A.size(0);
  const Tensor list = ids.to(at::kLong).contiguous().view({tokens});
  const Tensor invalid = list.lt(0).logical_or_(list >= vocab);
  const Tensor safe = list.masked_fill(invalid, 0);
  const Tensor grad = grad_y.reshape({tokens, dim}).to(acc).masked_fill(invalid.unsqueeze(1), 0).mul_(embed_scale);
  const Tensor B = lora_B.to(acc), rows = lora_A.index_select(1, safe).to(acc).t();
  const Tensor none = at::empty({0}, weight.options());
  Tensor grad_A = none, grad_B = none, grad_m = none;
  if (mask & 6) {
    const Tensor E = at::mm(grad.t(), rows);
    if (mask & 2) grad_B = (E * gain.unsqueeze(1)).mul_(scaling).to(lora_B.scalar_type());
    if (mask & 4) {
      const Tensor base = (grad * weight.index_select(0, safe)).sum(0);
      grad_m = (base + scaling * (E * B).sum(1)).div_(norm).masked_fill_(norm == 0, 0);
    }
  }
  if (mask & 1) {
    Tensor P = at::mm(grad, B * gain.unsqueeze(1)).mul_(scaling);
    if (padding_idx >= 0) P.masked_fill_((list == padding_idx).unsqueeze(1), 0);
    Tensor sum = at::zeros({r, vocab}, P.options());
    Tensor count = at::zeros({vocab}, P.options());
    const auto* ip = safe.const_data_ptr<int64_t>();
    AT_DISPATCH_FLOATING_TYPES(acc, "embedding_backward", [&] {
      const auto* pp = P.const_data_ptr<scalar_t>();
      auto *sp = sum.data_ptr<scalar_t>(), *cp = count.data_ptr<scalar_t>();
      for (int64_t t = 0; t < tokens; ++t) {
        ++cp[ip[t]];
        for (int64_t k = 0; k < r; ++k) sp[k * vocab + ip[t]] += pp[t * r + k];
      }
    });
    if (scale_grad_by_freq) sum.div_(count.clamp_min(1));
    grad_A = sum.to(lora_A.scalar_type());
  }
  return {grad_A, grad_B, grad_m};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("embedding_forward", embedding_forward);
  m.impl("embedding_backward", embedding_backward);
}

}  // namespace dora_ext
