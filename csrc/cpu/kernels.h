// The CPU's loops over raw pointers, compiled once per instruction set (kernels_*.cpp) and chosen at run time.
#pragma once

#include <cstdint>

namespace dora_ext::cpu {

// Storage of the half-precision types; the loops convert by vectors.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
struct AccType {
  using type = float;
};
template <>
struct AccType<double> {
  using type = double;
};
template <typename T>
using acc_type = typename AccType<T>::type;

// A product C M of rank r: C (rows, r) through its strides, M (r, columns) packed by `pack`.
template <typename A>
struct LowRank {
  const A* coefficients;  // C[i, k] at i * row_stride + k * k_stride
  int64_t row_stride, k_stride, r;
  const A* panels;
};

// Rows of a weight packed in NF4, from its weight `begin` on, which `bytes` begins with, and `scales` with its block's.
struct Nf4Rows {
  const uint8_t* bytes;
  int64_t begin, columns;
  int block_shift;
  const float *codebook, *scales;
};
constexpr int64_t kNf4MostRows = 16;
constexpr int64_t kNf4Step = 128;  // rows for the loops below have a multiple of it, and blocks 64 weights at least

// One to eight tokens, of X, times rows packed in NF4. Null where this machine has no such loops.
template <typename X>
struct Nf4Product {
  // x (tokens, columns) as `multiply` wants it.
  void (*arrange)(X* to, const X* x, int64_t tokens, int64_t columns);
  // out[token * ld + row] of the first `rows` rows, kNf4MostRows at most
  void (*multiply)(float* out, int64_t ld, const Nf4Rows& w, int64_t rows, const X* arranged, int64_t tokens);
};

// Every kernel works on the calling thread. T: element type of the large matrices, A: accumulators, and all small ones.
template <typename T, typename A = acc_type<T>>
struct Kernels {
  int64_t panel;  // columns of a panel
  int64_t lanes;  // accumulators in a vector

  // One panel (r, width) of M[k, j] * scale * column_scale[j], or of its first rows k; m at k * k_stride +
  // j * column_stride, from this panel's first column on, of which `columns` are left; columns past them are zero.
  // column_scale may be null. width is `panel` for LowRank.
  void (*pack)(A* panel, int64_t width, const A* m, int64_t k_stride, int64_t column_stride, int64_t r, int64_t columns,
               A scale, const A* column_scale);
  // sums[i] = sum_j (w[i, j] + (C M)[i, j])^2;  w (rows, columns) with row stride ld.
  void (*square_rows)(double* sums, const T* w, int64_t ld, int64_t rows, int64_t columns, LowRank<A> low);
  // sums[j] += sum_i (w[i, j] + (C M)[i, j])^2
  void (*square_columns)(A* sums, const T* w, int64_t ld, int64_t rows, int64_t columns, LowRank<A> low);
  // out (rows, r) = x N; x (rows, columns) with row stride ld, N (columns, r) packed in panels of one or two
  // `vectors`. Float and double only.
  void (*multiply_narrow)(T* out, const T* x, int64_t ld, int64_t rows, int64_t columns, const A* panels, int64_t r,
                          int64_t vectors);
  // out (r, width) += N^T X; N (rows, r), X (rows, width) packed in one panel, out with row stride out_ld. Float and
  // double only.
  void (*add_transposed_narrow)(T* out, int64_t out_ld, const A* narrow, int64_t r, const A* panel, int64_t rows,
                                int64_t width);
  // y = base * mul[j] + add[j] + C M;  y, base (rows, columns) contiguous, may be the same.
  void (*compose_by_column)(T* y, const T* base, int64_t rows, int64_t columns, LowRank<A> low, const A* mul,
                            const A* add);
  // y = base * mul[i] + add[i] + C M
  void (*compose_by_row)(T* y, const T* base, int64_t rows, int64_t columns, LowRank<A> low, const A* mul,
                         const A* add);
  // G = grad * mul[j] (null: not wanted), sums[j] += sum_i grad * (saved - sub[j]), sums[columns + j] += sum_i grad.
  void (*backward_by_column)(T* G, const T* grad, const T* saved, int64_t rows, int64_t columns, const A* mul,
                             const A* sub, A* sums);
  // G = grad * mul[i] (null: not wanted), sums[i] = sum_j grad * (saved - sub[i]), sums[rows + i] = sum_j grad.
  void (*backward_by_row)(T* G, const T* grad, const T* saved, int64_t rows, int64_t columns, const A* mul,
                          const A* sub, A* sums);
  // `blocks` times `count` weights packed in NF4 from bytes[0]'s high half on, an even number each: codebook value
  // times the block's scale, rounded to T; the second leaves them as accumulators. Not for double (null).
  void (*unpack_nf4)(T* out, const uint8_t* bytes, int64_t blocks, int64_t count, const float* codebook,
                     const float* scales);
  void (*unpack_nf4_wide)(A* out, const uint8_t* bytes, int64_t blocks, int64_t count, const float* codebook,
                          const float* scales);
  // Weights are rounded to T. Not for double (null).
  Nf4Product<float> nf4_product;
};

// The loops for this machine.
template <typename T>
const Kernels<T>& kernels();

// Tokens and rounded weights in bfloat16, products and sums in float.
const Nf4Product<BFloat16>& nf4_product_bfloat16();

}  // namespace dora_ext::cpu
