// hopper_forward: the forward of a linear layer as one product that makes h = x A^T first (product_first.cuh). Where it
// does not fit: layer_products.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../check_linear.h"
#include "../check_product.h"
#include "launch.h"
#include "product.cuh"
#include "product_face.h"

namespace dora_ext {
namespace {

constexpr int64_t kMostRanks = 64;

bool hopper_forward_fits(const Tensor& x, const Tensor& weight, const Tensor& lora_A) {
  const int64_t rank = lora_A.size(0);
  if (!is_half(x.scalar_type()) || rank % 8 != 0 || rank > kMostRanks) return false;
  const c10::cuda::CUDAGuard guard(x.device());
  return on_hopper() && has_product_kernel() && product_matrix_misfit(x) == nullptr &&
         product_matrix_misfit(weight) == nullptr && weight.size(0) % 8 == 0 && weight.size(1) % 8 == 0 &&
         choose_stretches(x.size(0), weight.size(0), multiprocessors()).count > 0;
}

template <typename T, int kRanks>
void run(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B, const Tensor& gain,
         const OptionalTensor& bias, double scaling, const Tensor& y, const Tensor& h) {
  const int64_t rows = x.size(0), columns = weight.size(0), rank = A.size(0);
  const int devices_multiprocessors = multiprocessors();
  const Stretches stretches = choose_stretches(rows, columns, devices_multiprocessors);
  const Tensor scaled_h = scaling == 1 ? h : at::empty_like(h);
  const Tensor g = aligned(gain, 8), b = bias ? aligned(*bias, 8) : Tensor();
  const ProductCounters counters = product_counters(x, /*any_first=*/true);
  HiddenFirst<T, kRanks> first{};
  if (!encode_map<T>(&first.lora_A, product_matrix(A), kRanks)) C10_CUDA_CHECK(cudaErrorInvalidValue);
  first.h = mutable_data<T>(h);
  first.scaled_h = scaling == 1 ? nullptr : mutable_data<T>(scaled_h);
  first.counters = reinterpret_cast<FirstCounters*>(counters.first);
  first.scaling = static_cast<float>(scaling);
  first.rank = static_cast<int>(rank);
  first.stretch = static_cast<int>(stretches.rows_of_tiles);
  ProductProblem p{};
  p.gain = data<float>(g);
  p.bias = bias ? data<float>(b) : nullptr;
  p.rows = static_cast<int>(rows);
  p.columns = static_cast<int>(columns);
  p.inner = static_cast<int>(x.size(1));
  p.tail = static_cast<int>(rank);
  p.first = static_cast<int>(stretches.count);
  p.counters = counters.tiles;
  const ProductMatrices m{product_matrix(x), product_matrix(weight), product_matrix(scaled_h), product_matrix(B),
                          product_matrix(y)};
  C10_CUDA_CHECK((launch_product<T, false>(m, p, first, devices_multiprocessors, current_stream())));
}

std::tuple<Tensor, Tensor> hopper_forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                                          const Tensor& lora_B, const Tensor& gain, const OptionalTensor& bias,
                                          double scaling) {
  const char* op = "dora_ext::hopper_forward";
  check_linear(op, x, weight, lora_A, lora_B, gain, bias, scaling, /*transposed=*/false);
  check_dim(op, "x", x, 2);
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK_VALUE(hopper_forward_fits(x, weight, lora_A), op,
                    ": x, weight, lora_A: expected what hopper_forward_fits says yes to");
  const auto dtype = x.scalar_type();
  const Tensor A = aligned(in_dtype(lora_A, dtype), 16), B = aligned(in_dtype(lora_B, dtype), 16);
  const Tensor g = in_dtype(gain, at::kFloat);
  const OptionalTensor b = bias ? OptionalTensor(in_dtype(*bias, at::kFloat)) : std::nullopt;
  const Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  const Tensor h = at::empty({x.size(0), A.size(0)}, x.options());
  const auto run_it = [&](auto tag) {
    using T = decltype(tag);
    return A.size(0) <= 16 ? run<T, 16> : A.size(0) <= 32 ? run<T, 32> : run<T, 64>;
  };
  if (dtype == at::kHalf) {
    run_it(__half{})(x, weight, A, B, g, b, scaling, y, h);
  } else {
    run_it(__nv_bfloat16{})(x, weight, A, B, g, b, scaling, y, h);
  }
  return {y, h};
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("hopper_forward", &hopper_forward);
  m.impl("hopper_forward_fits", &hopper_forward_fits);
}

}  // namespace dora_ext
