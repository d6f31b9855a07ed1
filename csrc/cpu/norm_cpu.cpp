// n = |W + s B A| by output feature and g = m / n, on the CPU. The sum W + s B A exists a tile at a time, in registers.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "../conv_norm.h"
#include "faces.h"
#include "norm_rows.h"

namespace dora_ext::cpu {
namespace {

// W where it is stored, by output feature (out, in).
template <typename T>
struct DenseRows {
  static constexpr int64_t kRows = 64, kScratch = 0;
  const T* w;
  int64_t ld, columns;

  const T* operator()(T*, int64_t row, int64_t, int64_t first, int64_t) const { return w + row * ld + first; }
};

// W is stored by input feature, `stored` (in, out): sums of blocks of rows, then of the blocks.
template <typename T>
void norm_by_column(const Tensor& stored, const Tensor& A, const Tensor& B, double scaling, Tensor& n) {
  using Acc = acc_type<T>;
  constexpr int64_t kMostBlocks = 256, kFewestRows = 64;
  const int64_t in = stored.size(0), out = stored.size(1), ld = stored.stride(0), r = A.size(0);
  const int64_t rows = std::max(kFewestRows, divide_up(divide_up(in, kMostBlocks), 8) * 8);
  const int64_t blocks = divide_up(in, rows);
  const Tensor panels = pack<T>(B.t(), scaling), partial = at::zeros({blocks, out}, n.options());
  const T* w = data<T>(stored);
  const Acc* a = data<Acc>(A);
  at::parallel_for(0, blocks, grain(rows * out), [&](int64_t begin, int64_t end) {
    std::vector<Acc> coefficients(rows * r);  // of a block, row by row: A's own rows are `in` apart
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block * rows, count = std::min(rows, in - row);
      for (int64_t k = 0; k < r; ++k)
        for (int64_t i = 0; i < count; ++i) coefficients[i * r + k] = a[k * A.stride(0) + (row + i) * A.stride(1)];
      const LowRank<Acc> low{coefficients.data(), r, 1, r, data<Acc>(panels)};
      kernels<T>().square_columns(data<Acc>(partial) + block * out, w + row * ld, ld, count, out, low);
    }
  });
  Acc* np = data<Acc>(n);
  for_column_sums(data<Acc>(partial), blocks, out,
                  [&](int64_t j, double sum) { np[j] = static_cast<Acc>(std::sqrt(sum)); });
}

void norm_into(Tensor& n, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling,
               bool transposed) {
  const auto dtype = weight.scalar_type(), acc = accumulate_type(dtype);
  const Tensor A = lora_A.to(dtype).to(acc), B = lora_B.to(dtype).to(acc);
  Tensor W = transposed ? weight.t() : weight;  // (out, in), however it is stored
  const bool by_column = W.stride(1) != 1 && W.stride(0) == 1;
  if (W.stride(1) != 1 && !by_column) W = W.contiguous();
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    if (by_column) return norm_by_column<T>(W.t(), A, B, scaling, n);
    norm_by_row<T>(DenseRows<T>{data<T>(W), W.stride(0), std::max<int64_t>(1, W.size(1))}, A, B, scaling, n);
  });
}

std::tuple<Tensor, Tensor> norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                const Tensor& magnitude, double scaling, bool transposed) {
  if (weight.dim() > 2) {
    return conv_norm(weight, lora_A, lora_B, magnitude,
                     [&](const Tensor& W, const Tensor& A, const Tensor& B, const Tensor& m) {
                       return norm(W, A, B, m, scaling, transposed);
                     });
  }
  check_norm(weight, lora_A, lora_B, magnitude, scaling, transposed);
  Tensor n = at::empty({lora_B.size(0)}, weight.options().dtype(accumulate_type(weight.scalar_type())));
  norm_into(n, weight, lora_A, lora_B, scaling, transposed);
  return {n, gain_of(magnitude, n)};
}

std::tuple<Tensor, Tensor> norm_cached(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                       const Tensor& magnitude, double scaling, bool transposed, Tensor& cached,
                                       Tensor& fingerprint, int64_t epoch) {
  if (weight.dim() > 2) {
    return conv_norm(weight, lora_A, lora_B, magnitude,
                     [&](const Tensor& W, const Tensor& A, const Tensor& B, const Tensor& m) {
                       return norm_cached(W, A, B, m, scaling, transposed, cached, fingerprint, epoch);
                     });
  }
  check_norm_cached(weight, lora_A, lora_B, magnitude, scaling, transposed, cached, fingerprint);
  Fingerprint now;
  const double settings[] = {scaling, static_cast<double>(transposed), static_cast<double>(weight.size(0)),
                             static_cast<double>(epoch)};
  now.add_bytes(settings, sizeof(settings));
  now.add(lora_A);
  now.add(lora_B);
  now.add_sample(weight);
  return recall(now, magnitude, cached, fingerprint,
                [&] { norm_into(cached, weight, lora_A, lora_B, scaling, transposed); });
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("norm", norm);
  m.impl("norm_cached", norm_cached);
}

}  // namespace dora_ext::cpu
