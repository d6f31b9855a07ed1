// hopper_product: checks, device guard, launch. The kernel and how tiles are chosen: product.cuh.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <utility>

#include "../check_product.h"
#include "launch.h"
#include "product.cuh"

namespace dora_ext {
namespace {

// What hopper_product would refuse that check_hopper_product has passed, and why; null: nothing.
const char* misfit(const Tensor& left, const Tensor& right, const OptionalTensor& left_tail,
                   const OptionalTensor& right_tail, bool right_transposed, const char** name) {
  *name = "left";
  if (capability() != 90 || map_encoder() == nullptr) {
    return "it on a Hopper GPU (compute capability 9.0)";
  }
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

// ProductProblem::counters for the current stream, whose products follow one another. A stream's id is never used
// again, as its address may be. Null under capture: replays of a graph run on other streams, beside this one's
// products.
unsigned* tile_counters(const Tensor& like) {
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return nullptr;
  static std::mutex mutex;
  static auto* const kept = new std::map<std::pair<int, unsigned long long>, Tensor>;  // the driver may be gone at exit
  unsigned long long stream = 0;
  C10_CUDA_CHECK(cudaStreamGetId(current_stream(), &stream));
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& counters = (*kept)[{like.get_device(), stream}];
  if (!counters.defined()) counters = at::zeros({2}, like.options().dtype(at::kInt));
  return reinterpret_cast<unsigned*>(counters.mutable_data_ptr());
}

HalfMatrix product_matrix(const Tensor& t) {
  return {t.const_data_ptr(), t.size(1), t.size(0), t.stride(0)};
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
  p.counters = tile_counters(left);
  if (left_tail) {
    m.left_tail = product_matrix(*left_tail);
    m.right_tail = product_matrix(*right_tail);
    p.tail = static_cast<int>(left_tail->size(1));
  }
  const auto launch = left.scalar_type() == at::kHalf ? launch_product<__half> : launch_product<__nv_bfloat16>;
  C10_CUDA_CHECK(launch(m, p, right_transposed, multiprocessors(), current_stream()));
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("hopper_product", &hopper_product);
  m.impl("hopper_product_fits", &hopper_product_fits);
}

}  // namespace dora_ext
