// What the CPU's faces share: from a tensor's dtype to the loops for it, and a low-rank product made ready for them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "check.h"
#include "kernels.h"

namespace dora_ext::cpu {

// f(T()), T being the element type of `dtype` as the loops know it.
template <typename F>
void dispatch(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    case at::kBFloat16:
      return f(BFloat16());
    case at::kHalf:
      return f(Float16());
    default:
      TORCH_CHECK_TYPE(false, "dora_ext: expected a float dtype, got ", dtype);
  }
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Work items that are worth a thread, when one takes `cost` elementary steps.
inline int64_t grain(int64_t cost) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, cost));
}

inline Tensor contiguous_as(const Tensor& t, at::ScalarType dtype) {
  return t.to(dtype).contiguous();
}

// m (r, columns), of the accumulator's dtype and any strides, times scale and, if there is one, times column_scale
// (columns,); packed in panels of `width` columns, `panel` of them for LowRank.
template <typename T>
Tensor pack(const Tensor& m, double scale, const Tensor* column_scale = nullptr, int64_t width = kernels<T>().panel) {
  using A = acc_type<T>;
  const auto& loops = kernels<T>();
  const int64_t r = m.size(0), columns = m.size(1), count = divide_up(columns, width);
  Tensor panels = at::empty({count * r * width}, m.options());
  A* to = data<A>(panels);
  const A *from = data<A>(m), *by = column_scale ? data<A>(*column_scale) : nullptr;
  // A few rows of a panel at a time: they stay in the L1 cache while they are filled column by column.
  constexpr int64_t kRows = 256;
  const int64_t pieces = divide_up(r, kRows);
  at::parallel_for(0, count * pieces, grain(std::min(r, kRows) * width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / pieces * width, k = i % pieces * kRows;
      loops.pack(to + first * r + k * width, width, from + k * m.stride(0) + first * m.stride(1), m.stride(0),
                 m.stride(1), std::min(kRows, r - k), columns - first, static_cast<A>(scale), by ? by + first : by);
    }
  });
  return panels;
}

// total[j] = sum over i of partial[i, j], in double and in the order of i, so that bits do not depend on threads.
template <typename A, typename F>
void for_column_sums(const A* partial, int64_t rows, int64_t columns, F f) {
  constexpr int64_t kWidth = 64;
  at::parallel_for(0, divide_up(columns, kWidth), grain(rows * kWidth), [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t first = strip * kWidth, width = std::min(kWidth, columns - first);
      double total[kWidth] = {};
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < width; ++j) total[j] += partial[i * columns + first + j];
      for (int64_t j = 0; j < width; ++j) f(first + j, total[j]);
    }
  });
}

// compose, from base into y (contiguous, may be the same); h and lora_B may be of a wider dtype than base.
void compose_into(const Tensor& y, const Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain,
                  const OptionalTensor& bias, double scaling, bool delta, bool channels_first);

}  // namespace dora_ext::cpu
