// hopper_backward: the gradients of a linear layer's x and A as one product that makes the latter last
// (product_last.cuh). Where it does not fit: layer_products.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../check_product.h"
#include "launch.h"
#include "product.cuh"
#include "product_face.h"

namespace dora_ext {
namespace {

constexpr int64_t kMostRanks = 64;

bool hopper_backward_fits(const Tensor& grad, const Tensor& weight, const Tensor& P, const Tensor& x) {
  const int64_t rank = P.size(1);
  if (!is_half(grad.scalar_type()) || rank % 8 != 0 || rank > kMostRanks) return false;
  const c10::cuda::CUDAGuard guard(grad.device());
  if (!on_hopper() || !has_product_kernel() || weight.size(1) % 8 != 0) return false;
  for (const Tensor& t : {grad, weight, P, x}) {
    if (product_matrix_misfit(t) != nullptr) return false;
  }
  return choose_last(x.size(0), x.size(1), grad.size(1), rank, multiprocessors()).count > 0;
}

template <typename T, int kRanks>
void run(const ProductMatrices& m, const ProductProblem& p, const HalfMatrix& x, const Tensor& grad_A, bool beside) {
  GradientLast<T, kRanks> last{};
  if (!encode_map<T>(&last.x, x, last.kTokens)) C10_CUDA_CHECK(cudaErrorInvalidValue);
  if (grad_A.scalar_type() == at::kFloat) {
    last.wide = mutable_data<float>(grad_A);
  } else {
    last.narrow = mutable_data<T>(grad_A);
  }
  C10_CUDA_CHECK(
      (launch_product_tiles<T, HopperTile<256>, true>(m, p, last, multiprocessors(), current_stream(), beside)));
}

std::tuple<Tensor, Tensor> hopper_backward(const Tensor& grad, const Tensor& weight, const Tensor& P,
                                           const Tensor& lora_A, const Tensor& x, bool beside) {
  const char* op = "dora_ext::hopper_backward";
  const auto dtype = grad.scalar_type();
  check_float(op, "lora_A", lora_A);
  const Tensor A = aligned(in_dtype(lora_A, dtype), 16);
  check_hopper_product(grad, weight, P, A, std::nullopt, std::nullopt, /*right_transposed=*/true);
  check_dim(op, "x", x, 2);
  check_shape(op, "x", x, {grad.size(0), weight.size(1)});
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, op, ": x: expected the dtype of grad, ", dtype, ", got ", x.scalar_type());
  check_device(op, "x", x, "grad", grad);
  const c10::cuda::CUDAGuard guard(grad.device());
  TORCH_CHECK_VALUE(hopper_backward_fits(grad, weight, P, x), op,
                    ": grad, weight, P, x: expected what hopper_backward_fits says yes to");
  const int64_t rows = x.size(0), columns = x.size(1), rank = P.size(1);
  const Tensor grad_x = at::empty({rows, columns}, x.options());
  const bool wide = lora_A.scalar_type() != dtype;
  const Tensor grad_A = at::empty({rank, columns}, x.options().dtype(wide ? at::kFloat : dtype));
  const ProductCounters counters = product_counters(grad, /*any_first=*/false);
  ProductProblem p{};
  p.rows = static_cast<int>(rows);
  p.columns = static_cast<int>(columns);
  p.inner = static_cast<int>(grad.size(1));
  p.tail = static_cast<int>(rank);
  p.group = kGroup;
  const Last last = choose_last(rows, columns, p.inner, rank, multiprocessors());
  p.last = static_cast<int>(last.count);
  p.spread = last.spread;
  p.counters = counters.tiles;
  const ProductMatrices m{product_matrix(grad), product_matrix(weight), product_matrix(P), product_matrix(A),
                          product_matrix(grad_x)};
  const auto run_it = [&](auto tag) {
    using T = decltype(tag);
    return rank <= 16 ? run<T, 16> : rank <= 32 ? run<T, 32> : run<T, 64>;
  };
  const auto matrix = product_matrix(x);
  beside = beside && !counters.fresh;
  dtype == at::kHalf ? run_it(__half{})(m, p, matrix, grad_A, beside)
                     : run_it(__nv_bfloat16{})(m, p, matrix, grad_A, beside);
  return {grad_x, in_dtype(grad_A, lora_A.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("hopper_backward", &hopper_backward);
  m.impl("hopper_backward_fits", &hopper_backward_fits);
}

}  // namespace dora_ext
