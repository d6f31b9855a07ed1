// hopper_forward: the forward of a linear layer as one product that makes h = x A^T first (product_first.cuh).
// hopper_forward_norm: with the norms, which the product makes first too, or which are launched before it. Where they
// do not fit: layer_products.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../check_linear.h"
#include "../check_product.h"
#include "../factors.h"
#include "../products.h"
#include "launch.h"
#include "norm_launch.h"
#include "product.cuh"
#include "product_face.h"

namespace dora_ext {
namespace {

constexpr int64_t kMostRanks = 64;

// What of it is made first, if it can be at all.
First choose(const Tensor& x, const Tensor& weight, const Tensor& lora_A, bool want_norms) {
  const int64_t rank = lora_A.size(0);
  if (!is_half(x.scalar_type()) || rank % 8 != 0 || rank > kMostRanks) return {};
  const c10::cuda::CUDAGuard guard(x.device());
  if (!on_hopper() || !has_product_kernel() || product_matrix_misfit(x) != nullptr ||
      product_matrix_misfit(weight) != nullptr || weight.size(0) % 8 != 0 || weight.size(1) % 8 != 0) {
    return {};
  }
  return choose_first(x.size(0), weight.size(0), rank, multiprocessors(), want_norms);
}
bool hopper_forward_fits(const Tensor& x, const Tensor& weight, const Tensor& lora_A) {
  return choose(x, weight, lora_A, /*want_norms=*/false).of_h > 0;
}
bool hopper_forward_norm_fits(const Tensor& x, const Tensor& weight, const Tensor& lora_A) {
  return weight.is_contiguous() && choose(x, weight, lora_A, /*want_norms=*/true).pairs > 0;
}

// A layer's forward, its matrices in one dtype; what goes in, and what comes out.
struct Forward {
  Tensor x, weight, A, B;
  OptionalTensor bias;  // fp32
  double scaling;
  First first;
  Tensor y, h, scaled_h, gain;  // gain is made, or given
  Tensor norm, magnitude;       // where norms are made
  const KeptNorms* kept = nullptr;
  bool beside = false;  // the launch before this one made nothing but the gain, or a fingerprint and A and B
  bool casts = false;   // the fingerprint's launch makes A and B
};

// How h is made first, but for its units.
template <typename T, int kRanks>
HiddenFirst<T, kRanks> hidden_first(const Forward& f, const ProductCounters& counters) {
  HiddenFirst<T, kRanks> first{};
  if (!encode_map<T>(&first.lora_A, product_matrix(f.A), kRanks)) C10_CUDA_CHECK(cudaErrorInvalidValue);
  first.counters = reinterpret_cast<FirstCounters*>(counters.first);
  first.scaling = static_cast<float>(f.scaling);
  first.rank = static_cast<int>(f.A.size(0));
  first.h = mutable_data<T>(f.h);
  first.scaled_h = f.scaling == 1 ? nullptr : mutable_data<T>(f.scaled_h);
  return first;
}

// h by itself, of as many rows in a launch as there are counters for.
template <typename T, int kRanks>
void make_hidden(const Forward& f) {
  constexpr int64_t kRows = 256, kMost = FirstCounters::kUnits * kRows;
  const ProductCounters counters = product_counters(f.x, /*any_first=*/true);
  auto first = hidden_first<T, kRanks>(f, counters);
  HalfMatrix x = product_matrix(f.x);
  for (int64_t left = x.y; left > 0; left -= kMost) {
    x.y = std::min(left, kMost);
    ProductProblem p{};
    p.rows = static_cast<int>(x.y);
    p.inner = static_cast<int>(x.x);
    p.counters = counters.tiles;
    first.units = first.early = static_cast<int>((x.y + kRows - 1) / kRows);
    p.first = std::min(first.units, multiprocessors() / 2);
    C10_CUDA_CHECK((launch_first<T>(x, p, first, current_stream())));
    x.data = static_cast<const T*>(x.data) + kMost * x.line;
    first.h += kMost * first.rank;
    if (first.scaled_h != nullptr) first.scaled_h += kMost * first.rank;
  }
}

template <typename T, int kRanks>
void run(const Forward& f) {
  const int64_t rows = f.x.size(0), columns = f.weight.size(0), rank = f.A.size(0);
  const Tensor g = aligned(f.gain, 8), b = f.bias ? aligned(*f.bias, 8) : Tensor();
  const ProductCounters counters = product_counters(f.x, /*any_first=*/true);
  auto first = hidden_first<T, kRanks>(f, counters);
  first.units = static_cast<int>(f.first.of_h);
  first.early = std::min(kGroup, first.units);
  if (f.first.of_norms > 0) {
    first.norms.units = static_cast<int>(f.first.of_norms);
    first.norms.magnitude = feature_vector(f.magnitude);
    first.norms.fingerprint = f.kept == nullptr ? nullptr : mutable_data<int64_t>(f.kept->fingerprint);
    first.norms.cached = f.kept == nullptr ? nullptr : mutable_data<float>(f.kept->cached);
    first.norms.norm = mutable_data<float>(f.norm);
    first.norms.gain = mutable_data<float>(f.gain);
  }
  ProductProblem p{};
  p.gain = data<float>(g);
  p.bias = f.bias ? data<float>(b) : nullptr;
  p.rows = static_cast<int>(rows);
  p.columns = static_cast<int>(columns);
  p.inner = static_cast<int>(f.x.size(1));
  p.tail = static_cast<int>(rank);
  p.first = static_cast<int>(f.first.pairs);
  p.counters = counters.tiles;
  const ProductMatrices m{product_matrix(f.x), product_matrix(f.weight), product_matrix(f.scaled_h),
                          product_matrix(f.B), product_matrix(f.y)};
  C10_CUDA_CHECK(
      (launch_product<T, false>(m, p, first, multiprocessors(), current_stream(), f.beside && !counters.fresh)));
}

// `call` with the dtype and the ranks that f's kernels have.
template <typename Call>
void with_kernel(const Forward& f, Call&& call) {
  const auto with_ranks = [&](auto tag) {
    const int64_t rank = f.A.size(0);
    rank <= 16   ? call(tag, std::integral_constant<int, 16>{})
    : rank <= 32 ? call(tag, std::integral_constant<int, 32>{})
                 : call(tag, std::integral_constant<int, 64>{});
  };
  f.x.scalar_type() == at::kHalf ? with_ranks(__half{}) : with_ranks(__nv_bfloat16{});
}

// All but gain and norms.
Forward prepare(const char* op, const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                const Tensor& feature, const OptionalTensor& bias, double scaling, bool want_norms, bool fingerprints) {
  check_linear(op, x, weight, lora_A, lora_B, feature, bias, scaling, /*transposed=*/false);
  check_dim(op, "x", x, 2);
  Forward f{};
  f.first = choose(x, weight, lora_A, want_norms);
  TORCH_CHECK_VALUE(want_norms ? f.first.pairs > 0 && weight.is_contiguous() : f.first.of_h > 0, op,
                    ": x, weight, lora_A: expected what hopper_forward", want_norms ? "_norm" : "",
                    "_fits says yes to");
  const auto dtype = x.scalar_type();
  f.x = x;
  f.weight = weight;
  const bool makes_h = f.first.of_h > 0;
  // A product for h comes before the fingerprint.
  f.casts = fingerprints && makes_h && cast_factors_fits(lora_A, lora_B, dtype);
  if (f.casts) {
    f.A = at::empty(lora_A.sizes(), x.options());
    f.B = at::empty(lora_B.sizes(), x.options());
  } else {
    const auto [A, B] = cast_factors(lora_A, lora_B, dtype);
    f.A = aligned(A, 16);
    f.B = aligned(B, 16);
  }
  if (bias) f.bias = in_dtype(*bias, at::kFloat);
  f.scaling = scaling;
  f.y = at::empty({x.size(0), weight.size(0)}, x.options());
  f.h = at::empty({x.size(0), f.A.size(0)}, x.options());
  f.scaled_h = scaling == 1 ? f.h : at::empty_like(f.h);
  if (!makes_h) with_kernel(f, [&](auto t, auto ranks) { make_hidden<decltype(t), decltype(ranks)::value>(f); });
  return f;
}

void run(const Forward& f) {
  with_kernel(f, [&](auto t, auto ranks) { run<decltype(t), decltype(ranks)::value>(f); });
}

std::tuple<Tensor, Tensor> hopper_forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                                          const Tensor& lora_B, const Tensor& gain, const OptionalTensor& bias,
                                          double scaling) {
  const c10::cuda::CUDAGuard guard(x.device());
  Forward f = prepare("dora_ext::hopper_forward", x, weight, lora_A, lora_B, gain, bias, scaling, false, false);
  f.gain = in_dtype(gain, at::kFloat);
  run(f);
  return {f.y, f.h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> with_norms(const char* op, const Tensor& x, const Tensor& weight,
                                                      const Tensor& lora_A, const Tensor& lora_B,
                                                      const Tensor& magnitude, const OptionalTensor& bias,
                                                      double scaling, const KeptNorms* kept) {
  const c10::cuda::CUDAGuard guard(x.device());
  Forward f = prepare(op, x, weight, lora_A, lora_B, magnitude, bias, scaling, true, kept != nullptr);
  f.magnitude = magnitude.contiguous();
  f.kept = kept;
  const FactorsToCast wide{lora_A, lora_B}, *cast = f.casts ? &wide : nullptr;
  if (f.first.of_norms > 0) {
    f.norm = at::empty({weight.size(0)}, x.options().dtype(at::kFloat));
    f.gain = at::empty_like(f.norm);
    if (kept != nullptr) launch_fingerprint_alone(weight, f.A, f.B, scaling, *kept, cast);
    f.beside = kept != nullptr;
  } else {
    std::tie(f.norm, f.gain) = launch_norms(weight, f.A, f.B, f.magnitude, scaling, /*transposed=*/false, kept, cast);
    f.beside = true;
  }
  run(f);
  return {f.y, f.h, f.norm, f.gain};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hopper_forward_norm(const Tensor& x, const Tensor& weight,
                                                               const Tensor& lora_A, const Tensor& lora_B,
                                                               const Tensor& magnitude, const OptionalTensor& bias,
                                                               double scaling) {
  return with_norms("dora_ext::hopper_forward_norm", x, weight, lora_A, lora_B, magnitude, bias, scaling, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hopper_forward_norm_cached(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
    const OptionalTensor& bias, double scaling, Tensor& cached, Tensor& fingerprint, int64_t epoch) {
  const char* op = "dora_ext::hopper_forward_norm_cached";
  check_cached(op, cached, fingerprint, weight, at::kFloat, weight.size(0));
  const KeptNorms kept{cached, fingerprint, epoch};
  return with_norms(op, x, weight, lora_A, lora_B, magnitude, bias, scaling, &kept);
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("hopper_forward", &hopper_forward);
  m.impl("hopper_forward_fits", &hopper_forward_fits);
  m.impl("hopper_forward_norm", &hopper_forward_norm);
  m.impl("hopper_forward_norm_cached", &hopper_forward_norm_cached);
  m.impl("hopper_forward_norm_fits", &hopper_forward_norm_fits);
}

}  // namespace dora_ext
