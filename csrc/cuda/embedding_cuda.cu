// embedding_forward and embedding_backward on CUDA: gathered rows through compose's kernels (embedding.cuh), products
// through the library.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../check.h"
#include "../feature_gradients.h"
#include "../inside_op.h"
#include "compose.cuh"
#include "compose_backward.cuh"
#include "embedding.cuh"
#include "launch.h"

namespace dora_ext {
namespace {

struct Gathered {
  Tensor rows;  // (tokens,) int64, -1 for an id out of range
  Tensor h;     // (tokens, rank), A[:, ids]^T in weight's dtype
};

Gathered gather(const Tensor& ids, const Tensor& weight, const Tensor& lora_A) {
  const Tensor list = ids.contiguous();
  const int64_t tokens = list.numel(), rank = lora_A.size(0);
  const Gathered result{at::empty({tokens}, list.options().dtype(at::kLong)),
                        at::empty({tokens, rank}, weight.options())};
  switch_dtype(weight.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto launch = [&](const auto* id) {
      launch_embedding_gather<T>(id, tokens, weight.size(0), feature_vector(lora_A), lora_A.stride(0), lora_A.stride(1),
                                 static_cast<int>(rank), mutable_data<int64_t>(result.rows), mutable_data<T>(result.h),
                                 current_stream());
    };
    if (list.scalar_type() == at::kLong) {
      launch(data<int64_t>(list));
    } else {
      launch(data<int32_t>(list));
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

Tensor embedding_forward_cuda(const Tensor& ids, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                              const Tensor& gain, double scaling, double embed_scale) {
  check_embedding("dora_ext::embedding_forward", ids, weight, lora_A, lora_B, gain, scaling);
  const c10::cuda::CUDAGuard guard(weight.device());
  const auto dtype = weight.scalar_type();
  auto shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  const Tensor y = at::empty(shape, weight.options());
  const Gathered gathered = gather(ids, weight, lora_A);
  const Tensor w = weight.contiguous(), B = in_dtype(lora_B, dtype).contiguous();
  const Tensor g = in_dtype(gain, accumulate_type(dtype)).contiguous();
  switch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    ComposeProblem<T> p{};
    p.base = data<T>(w);
    p.result = mutable_data<T>(y);
    p.h = data<T>(gathered.h);
    p.lora_B = data<T>(B);
    p.gain = data<Acc>(g);
    p.rows = data<int64_t>(gathered.rows);
    p.tokens = ids.numel();
    p.out = w.size(1);
    p.rank = static_cast<int>(B.size(1));
    p.scaling = static_cast<Acc>(scaling);
    p.gain_factor = static_cast<Acc>(embed_scale);
    launch_compose_features_last(p, current_stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return y;
}

// left right in `dtype`, not rounded to half precision on the way where the library can do without.
Tensor product(const Tensor& left, const Tensor& right, at::ScalarType dtype) {
  if (left.scalar_type() != dtype && dtype == at::kFloat) return at::mm(left, right, dtype);
  return at::mm(left, right).to(dtype);
}

struct ScaledGradient {
  Tensor D;       // (tokens, dim) = embed_scale * grad, zeros for ids out of range
  Tensor grad_m;  // (dim,) = sum_t D * W[ids] / n: the magnitude's gradient without the adapter's part
};

// grad (tokens, dim) contiguous; norm and gain contiguous in the accumulator's dtype.
ScaledGradient scale_gradient(const Tensor& grad, const Tensor& weight, const Tensor& rows, const Tensor& norm,
                              const Tensor& gain, double embed_scale) {
  const int64_t dim = weight.size(1);
  const ScaledGradient result{at::empty(grad.sizes(), grad.options()), at::empty({dim}, norm.options())};
  const Tensor w = weight.contiguous();
  const cudaStream_t stream = current_stream();
  switch_dtype(weight.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulate_t<T>;
    ComposeBackwardProblem<T> p{};
    p.grad = data<T>(grad);
    p.saved = data<T>(w);
    p.scaled = mutable_data<T>(result.D);
    p.gain_offset = static_cast<Acc>(embed_scale);
    p.rows = data<int64_t>(rows);
    p.tokens = grad.size(0);
    p.out = dim;
    const bool aligned = compose_backward_aligned(p, false);
    const BackwardPlan plan = plan_compose_backward<T>(p.tokens, 1, 1, dim, false, aligned, multiprocessors());
    const Tensor partials = at::empty({plan.splits, 2, dim}, norm.options());
    p.partials = mutable_data<Acc>(partials);
    launch_compose_backward_features_last(p, plan, aligned, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    launch_compose_backward_finish<Acc>(p.partials, plan.splits, dim, data<Acc>(norm), data<Acc>(gain),
                                        /*saved_is_output=*/false, static_cast<Acc>(embed_scale),
                                        feature_result(result.grad_m), nullptr, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

// shares (tokens, rank) of the tokens in the gradient of A, added up per id in a fixed order.
Tensor scatter(const Tensor& shares, const Tensor& rows, const Tensor& lora_A, int64_t padding_idx,
               bool scale_grad_by_freq) {
  const Tensor grad_A = at::zeros(lora_A.sizes(), lora_A.options());
  const auto [sorted, order] = at::sort(rows, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const int64_t *sorted_data = data<int64_t>(sorted), *order_data = data<int64_t>(order);
  switch_dtype(lora_A.scalar_type(), [&](auto tag) {
    using A = typename decltype(tag)::type;
    const auto launch = [&](const auto* values) {
      launch_embedding_scatter(sorted_data, order_data, values, rows.size(0), static_cast<int>(lora_A.size(0)),
                               padding_idx, scale_grad_by_freq, lora_A.size(1), mutable_data<A>(grad_A),
                               current_stream());
    };
    if (shares.scalar_type() == at::kDouble) {
      launch(data<double>(shares));
    } else {
      launch(data<float>(shares));
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad_A;
}

std::tuple<Tensor, Tensor, Tensor> embedding_backward_cuda(const Tensor& grad_y, const Tensor& ids,
                                                           const Tensor& weight, const Tensor& lora_A,
                                                           const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                                                           double scaling, double embed_scale, int64_t padding_idx,
                                                           bool scale_grad_by_freq, int64_t mask,
                                                           OptionalDtype magnitude_dtype) {
  const char* op = "dora_ext::embedding_backward";
  check_embedding(op, ids, weight, lora_A, lora_B, gain, scaling);
  auto shape = ids.sizes().vec();
  shape.push_back(weight.size(1));
  check_shape(op, "grad_y", grad_y, shape);
  check_device(op, "grad_y", grad_y, "weight", weight);
  check_feature(op, "norm", norm, weight.size(1), weight);
  const InsideOp inside;
  const c10::cuda::CUDAGuard guard(weight.device());
  const bool want_A = mask & 1, want_B = mask & 2, want_m = mask & 4;
  const int64_t tokens = ids.numel(), dim = weight.size(1);
  const auto dtype = weight.scalar_type(), accumulate = accumulate_type(dtype);
  const auto dtype_of_m = magnitude_dtype.value_or(norm.scalar_type());
  const Tensor none = at::empty({0}, weight.options());
  if (tokens == 0 || mask == 0) {
    return {want_A ? at::zeros(lora_A.sizes(), lora_A.options()) : none,
            want_B ? at::zeros(lora_B.sizes(), lora_B.options()) : none,
            want_m ? at::zeros(norm.sizes(), norm.options().dtype(dtype_of_m)) : none};
  }

  const Tensor n = in_dtype(norm, accumulate).contiguous(), g = in_dtype(gain, accumulate).contiguous();
  const Tensor grad = in_dtype(grad_y, dtype).reshape({tokens, dim}).contiguous();
  const Gathered gathered = gather(ids, weight, lora_A);
  const ScaledGradient scaled = scale_gradient(grad, weight, gathered.rows, n, g, embed_scale);
  OptionalTensor E;
  if (want_B || want_m) E = product(scaled.D.t(), gathered.h, accumulate);
  const auto [grad_B, grad_m, scaled_B] = feature_gradients_op(E, lora_B, n, g, scaled.grad_m, scaling, want_B,
                                                               dtype_if(want_m, dtype_of_m), dtype_if(want_A, dtype));
  if (!want_A) return {none, grad_B, grad_m};
  const Tensor P = product(scaled.D, scaled_B, accumulate);
  return {scatter(P, gathered.rows, lora_A, padding_idx, scale_grad_by_freq), grad_B, grad_m};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("embedding_forward", &embedding_forward_cuda);
  m.impl("embedding_backward", &embedding_backward_cuda);
}

}  // namespace dora_ext
