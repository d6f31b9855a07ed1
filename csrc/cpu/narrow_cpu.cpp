#include "narrow.h"

#include <ATen/ops/zeros.h>

#include <vector>

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

Tensor multiply_transposed_narrow(const Tensor& narrow, const Tensor& wide) {
  constexpr int64_t kRows = 512;  // of X in one panel: they stay in the L2 cache while all ranks use them
  const Tensor x = wide.stride(1) == 1 ? wide : wide.contiguous(), n = narrow.contiguous();
  const int64_t rows = x.size(0), columns = x.size(1), r = n.size(1), ld = x.stride(0);
  const Tensor out = at::zeros({r, columns}, x.options());
  dispatch_wide(x, [&](auto element) {
    using T = decltype(element);
    const auto& loops = kernels<T>();
    const int64_t width = loops.panel;
    at::parallel_for(0, divide_up(columns, width), grain(rows * r * width), [&](int64_t begin, int64_t end) {
      std::vector<T> panel(std::min(rows, kRows) * width);
      for (int64_t first = begin * width; first < std::min(end * width, columns); first += width) {
        for (int64_t row = 0; row < rows; row += kRows) {
          const int64_t count = std::min(kRows, rows - row), left = columns - first;
          loops.pack(panel.data(), width, data<T>(x) + row * ld + first, ld, 1, count, left, T(1), nullptr);
          loops.add_transposed_narrow(data<T>(out) + first, columns, data<T>(n) + row * r, r, panel.data(), count,
                                      left);
        }
      }
    });
  });
  return out;
}

Tensor transposed(const Tensor& t, double scaling) {
  Tensor out;
  dispatch_wide(t, [&](auto element) { out = pack<decltype(element)>(t.t(), scaling, nullptr, t.size(0)); });
  return out.view({t.size(1), t.size(0)});
}

}  // namespace dora_ext::cpu
