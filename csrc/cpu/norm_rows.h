// What norm_cpu.cpp (W as it is) and norm_nf4_cpu.cpp (W unpacked a piece at a time) share.
#pragma once

#include <ATen/ops/empty_like.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "faces.h"
#include "fingerprint.h"

namespace dora_ext::cpu {

// n[i] = |row i of W + s B A|, A (r, in) and B (out, r) of the accumulator's dtype. W comes in pieces of Source::kRows
// rows (so many read a block of A from the L2 cache) and `columns` columns, whole panels of them:
// source(scratch, row, rows, first, width) -> a pointer to the piece, whose rows are `ld` apart; scratch has kScratch
// elements of its own for each thread.
template <typename T, typename Source>
void norm_by_row(const Source& source, const Tensor& A, const Tensor& B, double scaling, Tensor& n) {
  using Acc = acc_type<T>;
  constexpr int64_t kRows = Source::kRows;
  const int64_t out = B.size(0), in = A.size(1), r = A.size(0);
  const Tensor panels = pack<T>(A, scaling);
  Acc* np = data<Acc>(n);
  at::parallel_for(0, divide_up(out, kRows), grain(kRows * in), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(Source::kScratch);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t row = chunk * kRows, rows = std::min(kRows, out - row);
      double sums[kRows] = {}, part[kRows];
      for (int64_t first = 0; first < in; first += source.columns) {
        const int64_t width = std::min(source.columns, in - first);
        const LowRank<Acc> low{data<Acc>(B) + row * B.stride(0), B.stride(0), B.stride(1), r,
                               data<Acc>(panels) + first * r};
        kernels<T>().square_rows(part, source(scratch.data(), row, rows, first, width), source.ld, rows, width, low);
        for (int64_t i = 0; i < rows; ++i) sums[i] += part[i];
      }
      for (int64_t i = 0; i < rows; ++i) np[row + i] = static_cast<Acc>(std::sqrt(sums[i]));
    }
  });
}

inline Tensor gain_of(const Tensor& magnitude, const Tensor& n) {
  const Tensor m = contiguous_as(magnitude, n.scalar_type());
  Tensor g = at::empty_like(n);
  dispatch(n.scalar_type(), [&](auto element) {
    using Acc = acc_type<decltype(element)>;
    const Acc *mp = data<Acc>(m), *np = data<Acc>(n);
    Acc* gp = data<Acc>(g);
    for (int64_t j = 0; j < n.numel(); ++j) gp[j] = np[j] > 0 ? mp[j] / np[j] : 0;
  });
  return g;
}

// n, computed into `cached` unless it was for this very fingerprint, and g; fresh tensors.
template <typename F>
std::tuple<Tensor, Tensor> recall(const Fingerprint& now, const Tensor& magnitude, Tensor& cached, Tensor& fingerprint,
                                  F compute) {
  int64_t* stored = data<int64_t>(fingerprint);
  if (stored[0] != now.value()) {
    compute();
    stored[0] = now.value();
    ++stored[3];
  }
  const Tensor n = cached.clone();
  return {n, gain_of(magnitude, n)};
}

}  // namespace dora_ext::cpu
