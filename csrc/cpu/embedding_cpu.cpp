// DoRA's embedding on the CPU: y = embed_scale * g * (W[ids] + s A[:, ids]^T B^T), and its gradients.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "../aligned.h"
#include "../feature_gradients.h"
#include "../inside_op.h"
#include "faces.h"

namespace dora_ext::cpu {
namespace {

// ids as int64 (tokens,), and the same with 0 in place of what is out of range, which must not be looked up.
struct Ids {
  Tensor given, safe;
  int64_t tokens, vocab;

  Ids(const Tensor& ids, int64_t vocab)
      : given(ids.to(at::kLong).contiguous().view({ids.numel()})), tokens(ids.numel()), vocab(vocab) {
    safe = given.masked_fill(given.lt(0).logical_or_(given.ge(vocab)), 0);
    TORCH_CHECK_VALUE(vocab > 0 || tokens == 0, "dora_ext::embedding: weight: expected at least one row");
  }
  bool valid(int64_t t) const { return at(t) >= 0 && at(t) < vocab; }
  int64_t at(int64_t t) const { return given.const_data_ptr<int64_t>()[t]; }
};

Tensor embedding_forward(const Tensor& ids, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                         const Tensor& gain, double scaling, double embed_scale) {
  check_embedding("dora_ext::embedding_forward", ids, weight, lora_A, lora_B, gain, scaling);
  const Ids list(ids, weight.size(0));
  Tensor y = at::index_select(weight, 0, list.safe).contiguous();
  const Tensor rows = at::index_select(lora_A, 1, list.safe).t();
  compose_into(y, y, rows, lora_B, gain.mul(embed_scale), std::nullopt, scaling, false, false);
  for (int64_t t = 0; t < list.tokens; ++t)
    if (!list.valid(t)) y.select(0, t).fill_(std::numeric_limits<double>::quiet_NaN());
  auto shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  return y.view(shape);
}

// sum over tokens of grad * W[ids], column by column (dim,); a block of rows at a time is gathered.
template <typename T>
void dot_with_weight(const Tensor& grad, const Tensor& weight, const Ids& ids, const Tensor& result) {
  using Acc = acc_type<T>;
  constexpr int64_t kFewestRows = 16, kMostBlocks = 128;
  const int64_t dim = grad.size(1), rows = std::max(kFewestRows, divide_up(ids.tokens, kMostBlocks));
  const int64_t blocks = divide_up(ids.tokens, rows);
  const Tensor sums = at::zeros({blocks, 2, dim}, result.options()), zeros = at::zeros_like(result);
  const T *dp = data<T>(grad), *w = data<T>(weight);
  const Acc* zero = data<Acc>(zeros);
  at::parallel_for(0, blocks, grain(rows * dim), [&](int64_t begin, int64_t end) {
    std::vector<T> gathered(kFewestRows * dim);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t t = b * rows; t < std::min((b + 1) * rows, ids.tokens); t += kFewestRows) {
        const int64_t count = std::min({kFewestRows, ids.tokens - t, (b + 1) * rows - t});
        for (int64_t i = 0; i < count; ++i) {
          T* to = gathered.data() + i * dim;
          ids.valid(t + i) ? std::memcpy(to, w + ids.at(t + i) * dim, dim * sizeof(T))
                           : std::memset(to, 0, dim * sizeof(T));
        }
        kernels<T>().backward_by_column(nullptr, dp + t * dim, gathered.data(), count, dim, zero, zero,
                                        data<Acc>(sums) + b * 2 * dim);
      }
  });
  Acc* to = data<Acc>(result);
  for_column_sums(data<Acc>(sums), blocks, 2 * dim, [&](int64_t j, double sum) {
    if (j < dim) to[j] = static_cast<Acc>(sum);
  });
}

// (r, vocab): column ids[t] gets column t of P (r, tokens). A thread owns whole ranks and adds in the order of the
// tokens, so that nothing races and bits repeat.
Tensor scatter_columns(const Tensor& P, const Ids& ids, int64_t padding_idx, bool scale_grad_by_freq) {
  const int64_t r = P.size(0);
  std::vector<int64_t> tokens, count(scale_grad_by_freq ? ids.vocab : 0);
  for (int64_t t = 0; t < ids.tokens; ++t) {
    if (!ids.valid(t) || ids.at(t) == padding_idx) continue;
    tokens.push_back(t);
    if (scale_grad_by_freq) ++count[ids.at(t)];
  }
  const Tensor result = at::zeros({r, ids.vocab}, P.options());
  dispatch(P.scalar_type(), [&](auto element) {
    using Acc = acc_type<decltype(element)>;
    at::parallel_for(0, r, grain(ids.tokens), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const Acc* from = data<Acc>(P) + k * ids.tokens;
        Acc* to = data<Acc>(result) + k * ids.vocab;
        for (const int64_t t : tokens) to[ids.at(t)] += scale_grad_by_freq ? from[t] / count[ids.at(t)] : from[t];
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> embedding_backward(const Tensor& grad_y, const Tensor& ids, const Tensor& weight,
                                                      const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm,
                                                      const Tensor& gain, double scaling, double embed_scale,
                                                      int64_t padding_idx, bool scale_grad_by_freq, int64_t mask,
                                                      OptionalDtype magnitude_dtype) {
  const InsideOp inside;
  const char* op = "dora_ext::embedding_backward";
  check_embedding(op, ids, weight, lora_A, lora_B, gain, scaling);
  check_feature(op, "norm", norm, lora_B.size(0), weight);
  auto shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  check_shape(op, "grad_y", grad_y, shape);
  const auto dtype = weight.scalar_type(), acc = accumulate_type(dtype);
  const Ids list(ids, weight.size(0));
  const Tensor grad = grad_y.to(dtype).reshape({list.tokens, weight.size(1)}).contiguous(), wide = grad.to(acc);
  const bool want_A = mask & 1, want_B = mask & 2, want_m = mask & 4;
  const Tensor n = in_dtype(norm, acc);
  OptionalTensor E, of_weight;
  if (want_B || want_m) {
    Tensor rows = in_dtype(at::index_select(lora_A, 1, list.safe), acc);
    rows.masked_fill_(list.given.ne(list.safe), 0).mul_(embed_scale);
    E = at::mm(rows, wide).t();  // embed_scale dY^T A[:, ids]^T (dim, r)
  }
  if (want_m) {
    of_weight = at::empty_like(n);
    dispatch(dtype,
             [&](auto element) { dot_with_weight<decltype(element)>(grad, weight.contiguous(), list, *of_weight); });
    of_weight->mul_(embed_scale).div_(n);
  }
  const auto [grad_B, grad_m, scaled_B] =
      feature_gradients_op(E, lora_B, n, gain, of_weight, scaling, want_B,
                           dtype_if(want_m, magnitude_dtype.value_or(norm.scalar_type())), dtype_if(want_A, acc));
  if (!want_A) return {at::empty({0}, weight.options()), grad_B, grad_m};
  const Tensor P = at::mm(scaled_B.t(), wide.t()).mul_(embed_scale);
  const Tensor grad_A = scatter_columns(P, list, padding_idx, scale_grad_by_freq);
  return {in_dtype(grad_A, lora_A.scalar_type()), grad_B, grad_m};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("embedding_forward", embedding_forward);
  m.impl("embedding_backward", embedding_backward);
}

}  // namespace dora_ext::cpu
