// norm_nf4 and norm_nf4_cached on CUDA. The kernels and which serves what: norm_nf4.cuh.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "../check.h"
#include "launch.h"
#include "nf4_operands.h"
#include "norm.cuh"
#include "norm_factors.h"
#include "norm_nf4.cuh"

namespace dora_ext {
namespace {

struct Nf4Call {
  Nf4Operands operands;
  int64_t blocksize;
  NormFactors factors;
  Tensor magnitude, norm, gain;
  int64_t* fingerprint;
  float* cached;

  void finish(const float* partials, int splits, int64_t row, int64_t rows, cudaStream_t stream) const {
    launch_norm_finish<float>(partials, splits, rows, feature_vector(magnitude.narrow(0, row, rows)), fingerprint,
                              cached == nullptr ? nullptr : cached + row, mutable_data<float>(norm) + row,
                              mutable_data<float>(gain) + row, stream);
  }
};

// Rows that are unpacked at once: whole NF4 blocks, lora_B's rows from 16 bytes on, and few enough to stay in an L2
// cache.
int64_t rows_at_once(int64_t out, int64_t in, int64_t blocksize) {
  const int64_t step = std::max<int64_t>(8, blocksize / std::gcd(blocksize, std::max<int64_t>(1, in)));
  const int64_t most = (int64_t{8} << 20) / std::max<int64_t>(1, in) / step * step;
  return std::min(out, std::max(step, most));
}

template <typename T>
void run_dense(const Nf4Call& call, NormProblem<T> problem, const NormDevice& device, cudaStream_t stream) {
  const int64_t out = problem.out, in = problem.in, at_once = rows_at_once(out, in, call.blocksize);
  const auto options = call.factors.A.options();
  const Tensor unpacked = at::empty({at_once, in}, options);
  Tensor partials;
  for (int64_t row = 0; row < out; row += at_once) {
    const int64_t rows = std::min(at_once, out - row);
    Nf4Scales scales = call.operands.scales;
    scales.first_block = row * in / call.blocksize;
    launch_dequantize_stale_nf4<T>(call.operands.bytes() + row * in / 2, scales, shift_of(call.blocksize), rows * in,
                                   mutable_data<T>(unpacked), call.fingerprint, stream);
    NormProblem<T> piece = problem;
    piece.weight = data<T>(unpacked);
    piece.lora_B += row * problem.rank;
    piece.out = rows;
    const NormPlan<T> plan = plan_norm<T, false>(piece, device);
    partials = at::empty({plan.splits.count, rows}, options.dtype(at::kFloat));
    piece.partials = mutable_data<float>(partials);
    launch_norm(plan, piece, stream);
    call.finish(piece.partials, plan.splits.count, row, rows, stream);
  }
}

// Whether there is a kernel for it; then it has run.
template <typename T>
bool run_packed(const Nf4Call& call, NormProblem<T> problem, const NormDevice& device, cudaStream_t stream) {
  const Nf4Matrix matrix{call.operands.bytes(), call.operands.scales, shift_of(call.blocksize)};
  const NormNf4Plan<T> plan = plan_norm_nf4<T>(problem, matrix, device.multiprocessors, device.shared_bytes);
  if (plan.kernel == nullptr) return false;
  const Tensor partials = at::empty({plan.strips, problem.out}, call.norm.options());
  problem.partials = mutable_data<float>(partials);
  plan.launch(problem, matrix, stream);
  call.finish(problem.partials, static_cast<int>(plan.strips), 0, problem.out, stream);
  return true;
}

// With `cached` and `fingerprint` null: always computed.
std::tuple<Tensor, Tensor> run_norm_nf4(const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                        at::IntArrayRef shape, at::ScalarType dtype,
                                        const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                                        const OptionalTensor& offset, int64_t nested_blocksize, const Tensor& lora_A,
                                        const Tensor& lora_B, const Tensor& magnitude, double scaling, Tensor* cached,
                                        Tensor* fingerprint, int64_t epoch) {
  const c10::cuda::CUDAGuard guard(packed.device());
  const auto options = packed.options().dtype(at::kFloat);
  const int64_t out = shape[0], in = shape[1];
  const Nf4Call call{{packed, absmax, nested_absmax, nested_code, offset, nested_blocksize},
                     blocksize,
                     {lora_A, lora_B, dtype, false},
                     magnitude.contiguous(),
                     at::empty({out}, options),
                     at::empty({out}, options),
                     fingerprint == nullptr ? nullptr : mutable_data<int64_t>(*fingerprint),
                     cached == nullptr ? nullptr : mutable_data<float>(*cached)};
  if (out == 0) return {call.norm, call.gain};
  const cudaStream_t stream = current_stream();
  const NormDevice device{multiprocessors(), shared_bytes_per_block(), capability()};

  switch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, double>) {
      const NormProblem<T> problem{nullptr,
                                   data<T>(call.factors.A),
                                   data<T>(call.factors.B),
                                   out,
                                   in,
                                   in,
                                   static_cast<int>(call.factors.A.size(0)),
                                   static_cast<float>(scaling),
                                   nullptr,
                                   call.fingerprint};
      if (call.fingerprint != nullptr) {
        const bool whole = in % 2 == 0;
        const Nf4Sizes sizes{packed.numel(), absmax.numel(), nested_absmax ? nested_absmax->numel() : 0,
                             whole ? out : 1, whole ? in / 2 : packed.numel()};
        const int64_t settings = (static_cast<int64_t>(dtype) << 40) + (nested_blocksize << 16) + blocksize;
        launch_fingerprint_nf4(problem, call.operands.bytes(), call.operands.scales, sizes, scaling, settings, epoch,
                               call.fingerprint, device.multiprocessors, stream);
      }
      if constexpr (sizeof(T) == 2) {
        if (run_packed<T>(call, problem, device, stream)) return;
      }
      run_dense<T>(call, problem, device, stream);
    }
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {call.norm, call.gain};
}

std::tuple<Tensor, Tensor> norm_nf4_cuda(const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                         at::IntArrayRef shape, at::ScalarType dtype,
                                         const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                                         const OptionalTensor& offset, int64_t nested_blocksize, const Tensor& lora_A,
                                         const Tensor& lora_B, const Tensor& magnitude, double scaling) {
  check_norm_nf4("dora_ext::norm_nf4", packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset,
                 nested_blocksize, lora_A, lora_B, magnitude, scaling);
  return run_norm_nf4(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                      lora_A, lora_B, magnitude, scaling, nullptr, nullptr, 0);
}

std::tuple<Tensor, Tensor> norm_nf4_cached_cuda(const Tensor& packed, const Tensor& absmax, int64_t blocksize,
                                                at::IntArrayRef shape, at::ScalarType dtype,
                                                const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                                                const OptionalTensor& offset, int64_t nested_blocksize,
                                                const Tensor& lora_A, const Tensor& lora_B, const Tensor& magnitude,
                                                double scaling, Tensor& cached, Tensor& fingerprint, int64_t epoch) {
  const char* op = "dora_ext::norm_nf4_cached";
  check_norm_nf4(op, packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                 lora_A, lora_B, magnitude, scaling);
  check_cached(op, cached, fingerprint, packed, at::kFloat, lora_B.size(0));
  return run_norm_nf4(packed, absmax, blocksize, shape, dtype, nested_absmax, nested_code, offset, nested_blocksize,
                      lora_A, lora_B, magnitude, scaling, &cached, &fingerprint, epoch);
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CUDA, m) {
  m.impl("norm_nf4", &norm_nf4_cuda);
  m.impl("norm_nf4_cached", &norm_nf4_cached_cuda);
}

}  // namespace dora_ext
