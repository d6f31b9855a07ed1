#include "narrow.h"

#include <ATen/ops/mm.h>

#include "faces.h"

namespace dora_ext::cpu {
namespace {

// Float or double, which the caller has made sure of.
template <typename F>
void dispatch_wide(const Tensor& t, F f) {
  t.scalar_type() == at::kDouble ? f(double()) : f(float());
}

}  // namespace

Tensor multiply_narrow(const Tensor& wide, const Tensor& narrow, double scaling) {
  constexpr int64_t kMostVectors = 2;  // more would stream the panel from the L2 cache for too few rows
  const Tensor x = wide.stride(1) == 1 ? wide : wide.contiguous();
  const int64_t rows = x.size(0), columns = x.size(1), r = narrow.size(1), ld = x.stride(0);
  const Tensor out = at::empty({rows, r}, x.options());
  dispatch_wide(x, [&](auto element) {
    using T = decltype(element);
    const auto& loops = kernels<T>();
    const int64_t vectors = std::min(kMostVectors, divide_up(r, loops.lanes));
    const Tensor panels = pack<T>(narrow, scaling, nullptr, vectors * loops.lanes);
    const T* from = data<T>(x);
    T* to = data<T>(out);
    // Whole tiles for every thread.
    constexpr int64_t kRows = 8;
    at::parallel_for(0, divide_up(rows, kRows), grain(kRows * columns), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kRows, count = std::min(end * kRows, rows) - first;
      loops.multiply_narrow(to + first * r, from + first * ld, ld, count, columns, data<T>(panels), r, vectors);
    });
  });
  return out;
}

Tensor multiply_transposed_narrow(const Tensor& wide, const Tensor& narrow, double scaling) {
  // (r, columns) is the form that the library does best; turning it round by aten::copy_ would cost as much again.
  const Tensor turned = at::mm(narrow.t(), wide);
  Tensor out;
  dispatch_wide(wide,
                [&](auto element) { out = pack<decltype(element)>(turned.t(), scaling, nullptr, narrow.size(1)); });
  return out.view({wide.size(1), narrow.size(1)});
}

}  // namespace dora_ext::cpu
