// hopper_product: checks, device guard, launch. The kernel and how tiles are chosen: product.cuh.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../check_product.h"
#include "launch.h"
#include "product.cuh"
#include "product_face.h"

namespace dora_ext {
namespace {

// What hopper_product would refuse that check_hopper_product has passed, and why; null: nothing.
const char* misfit(const Tensor& left, const Tensor& right, const OptionalTensor& left_tail,
                   const OptionalTensor& right_tail, bool right_transposed, const char** name) {
  *name = "left";
  if (!on_hopper()) return "it on a Hopper GPU (compute capability 9.0)";
  *name = "this build";
  if (!has_product_kernel()) return "kernels for compute capability 9.0 in it: TORCH_CUDA_ARCH_LIST was without 9.0";
  *name = "left";
  if (const char* why = product_matrix_misfit(left)) return why;
  *name = "right";
  // The result's rows lie on 16 bytes too.
  if (right.size(right_transposed ? 1 : 0) % 8 != 0) return "a multiple of 8 columns of the result";
  if (const char* why = product_matrix_misfit(right)) return why;
  *name = "left_tail";
  if (const char* why = left_tail ? product_matrix_misfit(*left_tail) : nullptr) return why;
  *name = "right_tail";
  return right_tail ? product_matrix_misfit(*right_tail) : nullptr;
}

bool hopper_product_fits(const Tensor& left, const Tensor& right, const OptionalTensor& left_tail,
                         const OptionalTensor& right_tail, bool right_transposed) {
  const c10::cuda::CUDAGuard guard(left.device());
  const char* name = nullptr;
  return is_half(left.scalar_type()) && misfit(left, right, left_tail, right_tail, right_transposed, &name) == nullptr;
}

Tensor hopper_product(const Tensor& left, const Tensor& right, const OptionalTensor& left_tail,
                      const OptionalTensor& right_tail, const OptionalTensor& gain, const OptionalTensor& bias,
                      bool right_transposed) {
  check_hopper_product(left, right, left_tail, right_tail, gain, bias, right_transposed);
  const c10::cuda::CUDAGuard guard(left.device());
  const char* name = nullptr;
  const char* why = misfit(left, right, left_tail, right_tail, right_transposed, &name);
  TORCH_CHECK_VALUE(why == nullptr, "dora_ext::hopper_product: ", name, ": expected ", why);
  const int64_t rows = left.size(0), columns = right.size(right_transposed ? 1 : 0);
  const Tensor result = at::empty({rows, columns}, left.options());
  // Two numbers of them are loaded at a time.
  const Tensor gain_ = gain ? aligned(*gain, 8) : Tensor(), bias_ = bias ? aligned(*bias, 8) : Tensor();
  ProductMatrices m{product_matrix(left), product_matrix(right), {}, {}, product_matrix(result)};
  ProductProblem p{};
  p.gain = gain ? data<float>(gain_) : nullptr;
  p.bias = bias ? data<float>(bias_) : nullptr;
  p.rows = static_cast<int>(rows);
  p.columns = static_cast<int>(columns);
  p.inner = static_cast<int>(left.size(1));
  const ProductCounters counters = product_counters(left, /*any_first=*/false);
  p.counters = counters.tiles;
  if (left_tail) {
    m.left_tail = product_matrix(*left_tail);
    m.right_tail = product_matrix(*right_tail);
    p.tail = static_cast<int>(left_tail->size(1));
  }
  const auto launch = left.scalar_type() == at::kHalf
                          ? (right_transposed ? launch_product<__half, true, NothingFirst>
                                              : launch_product<__half, false, NothingFirst>)
                          : (right_transposed ? launch_product<__nv_bfloat16, true, NothingFirst>
                                              : launch_product<__nv_bfloat16, false, NothingFirst>);
  C10_CUDA_CHECK(launch(m, p, NothingFirst{}, multiprocessors(), current_stream(), /*beside=*/false));
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("hopper_product", &hopper_product);
  m.impl("hopper_product_fits", &hopper_product_fits);
}

}  // namespace dora_ext
