#include "product.h"

#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <vector>

#include "faces.h"
#include "narrow.h"

namespace dora_ext::cpu {
namespace {

// MKL, to which torch gives float products, uses AVX2 at most on processors that Intel did not make, and does few rows
// slowly. On an AMD EPYC of 2024, two threads, GFLOP/s of MKL, ours, and ours with AVX2 (k and columns 2048, stored
// either way; the last column 1024):
//   rows     32            64            128           512          2048
//   MKL     115           137           155           198           219
//   ours    220 to 280    280 to 360    340 to 375    400 to 420    395
//   AVX2    150 to 180    160 to 200    180 to 195    210           205
// On one of 2021, which has AVX2 only, MKL is the faster one: 46 to 59, 69 to 92, 101 to 104 and 106 to 116 for 32, 64,
// 128 and 512 rows; ours 33 to 39, 57 to 64, 72 to 75 and 103 to 107.
//
// Fewer rows are not worth packing the other matrix. Up to 8 the products are a matter of reading it: from memory, not
// from a cache, MKL takes 730 us for one row and 1100 for eight, the loop for narrow matrices some 450 for either.
// Small products are done before threads have begun.
enum class Way { kLibrary, kOurs, kFewRows };
Way choose(const Tensor& left, const Tensor& right) {
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd");
  static const bool wide = at::get_cpu_capability() == "AVX512";
  constexpr int64_t kFewestSteps = int64_t{1} << 21;
  const int64_t rows = left.size(0);
  if (!amd || !wide || left.scalar_type() != at::kFloat || rows * left.size(1) * right.size(1) < kFewestSteps) {
    return Way::kLibrary;
  }
  if (rows <= 8 && right.stride(0) == 1) return Way::kFewRows;
  if (rows >= 32) return Way::kOurs;
#endif
  return Way::kLibrary;
}

// Of the matrices, kDepth at a time: a panel of `right` (kDepth x two vectors) stays in the L1 cache while all of
// `left` meets it, kRows rows at once, packed so that one k of theirs lies side by side.
template <typename T>
void add_product(Tensor& out, const Tensor& left, const Tensor& right) {
  constexpr int64_t kRows = 8, kDepth = 256;
  const auto& loops = kernels<T>();
  const int64_t rows = left.size(0), inner = left.size(1), columns = right.size(1), width = loops.panel;
  const int64_t tiles = divide_up(rows, kRows), panels = divide_up(columns, width);
  const Tensor packed = at::empty({rows * std::min(kDepth, inner)}, left.options());
  T *const y = data<T>(out), *const lefts = data<T>(packed);
  for (int64_t k = 0; k < inner; k += kDepth) {
    const int64_t depth = std::min(kDepth, inner - k);
    at::parallel_for(0, tiles, grain(kRows * depth), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kRows; row < std::min(end * kRows, rows); row += kRows) {
        const int64_t count = std::min(kRows, rows - row);
        const T* from = data<T>(left) + row * left.stride(0) + k * left.stride(1);
        loops.pack(lefts + row * depth, count, from, left.stride(1), left.stride(0), depth, count, T(1), nullptr);
      }
    });
    at::parallel_for(0, panels, grain(rows * depth * width), [&](int64_t begin, int64_t end) {
      std::vector<T> panel(depth * width);
      for (int64_t first = begin * width; first < std::min(end * width, columns); first += width) {
        const T* from = data<T>(right) + k * right.stride(0) + first * right.stride(1);
        loops.pack(panel.data(), width, from, right.stride(0), right.stride(1), depth, columns - first, T(1), nullptr);
        for (int64_t row = 0; row < rows; row += kRows) {
          loops.add_transposed_narrow(y + row * columns + first, columns, lefts + row * depth,
                                      std::min(kRows, rows - row), panel.data(), depth, columns - first);
        }
      }
    });
  }
}

}  // namespace

Tensor multiply(const Tensor& left, const Tensor& right, const OptionalTensor& bias) {
  switch (choose(left, right)) {
    case Way::kLibrary:
      return bias ? at::linear(left, right.t(), bias) : at::mm(left, right);
    case Way::kFewRows: {  // the other matrix goes by once, as it lies
      const Tensor out = multiply_narrow(right.t(), left.t(), 1).t().contiguous();
      return bias ? out.add_(*bias) : out;
    }
    case Way::kOurs:
      break;
  }
  Tensor out = at::empty({left.size(0), right.size(1)}, left.options());
  bias ? out.copy_(bias->expand_as(out)) : out.zero_();
  add_product<float>(out, left, right);
  return out;
}

}  // namespace dora_ext::cpu
