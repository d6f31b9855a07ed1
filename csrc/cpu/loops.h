// The loops of kernels.h, for one instruction set. The including file sets VECTOR_BYTES, TILE_ROWS and TILE_VECTORS
// (rows x vectors of a tile that stays in registers, with what feeds it) and INSTRUCTION_SET, the namespace. 64 bytes
// stand for AVX-512 with all that came before it, 32 for AVX2, FMA and F16C: before GCC 13 the compiler's own macros
// (__AVX2__) don't follow its target pragma in C++.

namespace dora_ext::cpu {
namespace INSTRUCTION_SET {

#include "vectors.h"

// Columns of panels that are swept before the rows move on, so that large ranks stay in the L2 cache.
constexpr int64_t kPanelBytes = 512 * 1024;

template <typename T>
constexpr int64_t kPanel = TILE_VECTORS * kLanes<T>;

template <typename T>
void pack(acc_type<T>* panel, int64_t width, const acc_type<T>* m, int64_t k_stride, int64_t column_stride, int64_t r,
          int64_t columns, acc_type<T> scale, const acc_type<T>* column_scale) {
  const int64_t used = min(width, columns);
  if (column_stride == 1) {  // in the order in which m is stored
    for (int64_t k = 0; k < r; ++k)
      for (int64_t j = 0; j < used; ++j)
        panel[k * width + j] = (column_scale ? scale * column_scale[j] : scale) * m[k * k_stride + j];
  } else {
    for (int64_t j = 0; j < used; ++j) {
      const acc_type<T> by = column_scale ? scale * column_scale[j] : scale;
      for (int64_t k = 0; k < r; ++k) panel[k * width + j] = by * m[k * k_stride + j * column_stride];
    }
  }
  for (int64_t j = used; j < width; ++j)
    for (int64_t k = 0; k < r; ++k) panel[k * width + j] = 0;
}

// A tile of R rows and one panel of columns. `Full` false: only the first `width` columns exist.
template <typename T, int R, bool Full>
struct Tile {
  using A = acc_type<T>;
  using V = Vector<T>;
  static constexpr int C = TILE_VECTORS;

  static inline V load_at(const T* p, int j, int64_t width) {
    return Full ? load(p + j * kLanes<T>) : load_first(p + j * kLanes<T>, width - j * kLanes<T>);
  }
  static inline void store_at(T* p, int j, int64_t width, V v) {
    Full ? store(p + j * kLanes<T>, v) : store_first(p + j * kLanes<T>, v, width - j * kLanes<T>);
  }

  // v = C M, from zero: a sum that began with the large matrix's element would round at its size r times.
  static inline void low_rank(V (&v)[R][C], const LowRank<A>& low, int64_t row, int64_t panel) {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j) v[i][j] = V{};
    const A* c = low.coefficients + row * low.row_stride;
    const A* m = low.panels + panel * low.r * kPanel<T>;
    for (int64_t k = 0; k < low.r; ++k, c += low.k_stride, m += kPanel<T>) {
      V mk[C];
      for (int j = 0; j < C; ++j) mk[j] = load(m + j * kLanes<T>);
      for (int i = 0; i < R; ++i) {
        const V ci = c[i * low.row_stride] - V{};  // minus zero: plus zero would not fold away
        for (int j = 0; j < C; ++j) v[i][j] += ci * mk[j];
      }
    }
  }
};

// work.template run<R, Full>(row, column, panel, width) over all tiles: blocks of panels, then groups of rows, then
// panels. after(row, R) follows each group's sweep over a block.
template <typename T, typename Work>
inline void for_tiles(int64_t rows, int64_t columns, int64_t r, Work& work) {
  const int64_t panels = (columns + kPanel<T> - 1) / kPanel<T>;
  const int64_t fit = kPanelBytes / (r * kPanel<T> * static_cast<int64_t>(sizeof(acc_type<T>)));
  const int64_t per_block = fit > 1 ? fit : 1;
  for (int64_t block = 0; block < panels; block += per_block) {
    const int64_t block_end = min(block + per_block, panels);
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS) work.template sweep<TILE_ROWS>(row, block, block_end, columns);
    for (; row < rows; ++row) work.template sweep<1>(row, block, block_end, columns);
  }
}

template <typename T>
struct SquareRows {
  double* sums;
  const T* w;
  int64_t ld;
  LowRank<acc_type<T>> low;

  template <int R>
  void sweep(int64_t row, int64_t begin, int64_t end, int64_t columns) {
    Vector<T> sum[R] = {};
    const int64_t full = min(end, columns / kPanel<T>);
    int64_t p = begin;
    for (; p < full; ++p) add<R, true>(sum, row, p, kPanel<T>);
    if (p < end) add<R, false>(sum, row, p, columns - p * kPanel<T>);
    for (int i = 0; i < R; ++i) sums[row + i] += sum_lanes(sum[i]);
  }

  template <int R, bool Full>
  inline void add(Vector<T> (&sum)[R], int64_t row, int64_t p, int64_t width) {
    using Tile = Tile<T, R, Full>;
    Vector<T> v[R][Tile::C];
    const T* at = w + row * ld + p * kPanel<T>;
    Tile::low_rank(v, low, row, p);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < Tile::C; ++j) v[i][j] += Tile::load_at(at + i * ld, j, width);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < Tile::C; ++j) sum[i] += v[i][j] * v[i][j];
  }
};

template <typename T>
struct SquareColumns {
  acc_type<T>* sums;
  const T* w;
  int64_t ld;
  LowRank<acc_type<T>> low;

  template <int R>
  void sweep(int64_t row, int64_t begin, int64_t end, int64_t columns) {
    const int64_t full = min(end, columns / kPanel<T>);
    int64_t p = begin;
    for (; p < full; ++p) add<R, true>(row, p, kPanel<T>);
    if (p < end) add<R, false>(row, p, columns - p * kPanel<T>);
  }

  template <int R, bool Full>
  inline void add(int64_t row, int64_t p, int64_t width) {
    using Tile = Tile<T, R, Full>;
    using Sums = cpu::INSTRUCTION_SET::Tile<acc_type<T>, 1, Full>;
    Vector<T> v[R][Tile::C];
    const T* at = w + row * ld + p * kPanel<T>;
    Tile::low_rank(v, low, row, p);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < Tile::C; ++j) v[i][j] += Tile::load_at(at + i * ld, j, width);
    acc_type<T>* to = sums + p * kPanel<T>;
    for (int j = 0; j < Tile::C; ++j) {
      Vector<T> sum = Sums::load_at(to, j, width);
      for (int i = 0; i < R; ++i) sum += v[i][j] * v[i][j];
      Sums::store_at(to, j, width, sum);
    }
  }
};

template <typename T, bool ByRow>
struct Compose {
  T* y;
  const T* base;
  int64_t ld;
  LowRank<acc_type<T>> low;
  const acc_type<T>*mul, *add;

  template <int R>
  void sweep(int64_t row, int64_t begin, int64_t end, int64_t columns) {
    const int64_t full = min(end, columns / kPanel<T>);
    int64_t p = begin;
    for (; p < full; ++p) one<R, true>(row, p, kPanel<T>);
    if (p < end) one<R, false>(row, p, columns - p * kPanel<T>);
  }

  template <int R, bool Full>
  inline void one(int64_t row, int64_t p, int64_t width) {
    using Tile = Tile<T, R, Full>;
    using Factors = cpu::INSTRUCTION_SET::Tile<acc_type<T>, 1, Full>;
    using V = Vector<T>;
    V v[R][Tile::C];
    const int64_t at = row * ld + p * kPanel<T>;
    Tile::low_rank(v, low, row, p);
    for (int j = 0; j < Tile::C; ++j) {
      const V column_mul = ByRow ? V{} : Factors::load_at(mul + p * kPanel<T>, j, width);
      const V column_add = ByRow ? V{} : Factors::load_at(add + p * kPanel<T>, j, width);
      for (int i = 0; i < R; ++i) {
        const V loaded = Tile::load_at(base + at + i * ld, j, width);
        v[i][j] += ByRow ? loaded * mul[row + i] + add[row + i] : loaded * column_mul + column_add;
      }
    }
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < Tile::C; ++j) Tile::store_at(y + at + i * ld, j, width, v[i][j]);
  }
};

template <typename T>
void square_rows(double* sums, const T* w, int64_t ld, int64_t rows, int64_t columns, LowRank<acc_type<T>> low) {
  for (int64_t i = 0; i < rows; ++i) sums[i] = 0;
  SquareRows<T> work{sums, w, ld, low};
  for_tiles<T>(rows, columns, low.r, work);
}

template <typename T>
void square_columns(acc_type<T>* sums, const T* w, int64_t ld, int64_t rows, int64_t columns,
                    LowRank<acc_type<T>> low) {
  SquareColumns<T> work{sums, w, ld, low};
  for_tiles<T>(rows, columns, low.r, work);
}

template <typename T, bool ByRow>
void compose(T* y, const T* base, int64_t rows, int64_t columns, LowRank<acc_type<T>> low, const acc_type<T>* mul,
             const acc_type<T>* add) {
  Compose<T, ByRow> work{y, base, columns, low, mul, add};
  for_tiles<T>(rows, columns, low.r, work);
}

// R rows and one vector of columns: the sums are read and written once for all rows, and every load comes before the
// first store, because rows a multiple of 4 KiB apart would make a load wait for the store before it.
template <typename T, int R, bool Full>
inline void backward_strip(T* G, const T* grad, const T* saved, int64_t columns, const acc_type<T>* mul,
                           const acc_type<T>* sub, acc_type<T>* sums, int64_t j) {
  using Wide = Tile<T, R, Full>;
  using Small = Tile<acc_type<T>, R, Full>;
  const int64_t width = columns - j;
  const Vector<T> m = Small::load_at(mul + j, 0, width), c = Small::load_at(sub + j, 0, width);
  Vector<T> product = Small::load_at(sums + j, 0, width), plain = Small::load_at(sums + columns + j, 0, width);
  Vector<T> d[R];
  for (int i = 0; i < R; ++i) {
    d[i] = Wide::load_at(grad + i * columns + j, 0, width);
    product += d[i] * (Wide::load_at(saved + i * columns + j, 0, width) - c);
    plain += d[i];
  }
  Small::store_at(sums + j, 0, width, product);
  Small::store_at(sums + columns + j, 0, width, plain);
  if (G == nullptr) return;
  for (int i = 0; i < R; ++i) Wide::store_at(G + i * columns + j, 0, width, d[i] * m);
}

template <typename T, int R>
inline void backward_rows(T* G, const T* grad, const T* saved, int64_t columns, const acc_type<T>* mul,
                          const acc_type<T>* sub, acc_type<T>* sums) {
  int64_t j = 0;
  for (; j + kLanes<T> <= columns; j += kLanes<T>)
    backward_strip<T, R, true>(G, grad, saved, columns, mul, sub, sums, j);
  if (j < columns) backward_strip<T, R, false>(G, grad, saved, columns, mul, sub, sums, j);
}

template <typename T>
void backward_by_column(T* G, const T* grad, const T* saved, int64_t rows, int64_t columns, const acc_type<T>* mul,
                        const acc_type<T>* sub, acc_type<T>* sums) {
  constexpr int R = 8;
  const int64_t step = G == nullptr ? 0 : columns;
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    backward_rows<T, R>(G + i * step, grad + i * columns, saved + i * columns, columns, mul, sub, sums);
  for (; i < rows; ++i)
    backward_rows<T, 1>(G + i * step, grad + i * columns, saved + i * columns, columns, mul, sub, sums);
}

template <typename T>
void backward_by_row(T* G, const T* grad, const T* saved, int64_t rows, int64_t columns, const acc_type<T>* mul,
                     const acc_type<T>* sub, acc_type<T>* sums) {
  for (int64_t i = 0; i < rows; ++i, grad += columns, saved += columns) {
    Vector<T> product = {}, plain = {};
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      // Lanes past the end have d = 0 and add nothing.
      const Vector<T> d = load_first(grad + j, columns - j), v = load_first(saved + j, columns - j);
      product += d * (v - sub[i]);
      plain += d;
      if (G != nullptr) store_first(G + i * columns + j, d * mul[i], columns - j);
    }
    sums[i] = static_cast<acc_type<T>>(sum_lanes(product));
    sums[rows + i] = static_cast<acc_type<T>>(sum_lanes(plain));
  }
}

#include "narrow_loops.h"
#include "nf4_loops.h"

template <typename T>
Kernels<T> table() {
  return {kPanel<T>,
          kLanes<T>,
          pack<T>,
          square_rows<T>,
          square_columns<T>,
          multiply_narrow<T>,
          add_transposed_narrow<T>,
          compose<T, false>,
          compose<T, true>,
          backward_by_column<T>,
          backward_by_row<T>,
          unpack_nf4_or_null<T, T>(),
          unpack_nf4_or_null<T, acc_type<T>>(),
          nf4_product<T>()};
}

}  // namespace INSTRUCTION_SET

#define DORA_EXT_TABLE_(set, T)                        \
  const Kernels<T>& set##_kernels(T) {                 \
    static const Kernels<T> kernels = set::table<T>(); \
    return kernels;                                    \
  }
#define DORA_EXT_TABLE(set, T) DORA_EXT_TABLE_(set, T)
DORA_EXT_TABLE(INSTRUCTION_SET, float)
DORA_EXT_TABLE(INSTRUCTION_SET, double)
DORA_EXT_TABLE(INSTRUCTION_SET, BFloat16)
DORA_EXT_TABLE(INSTRUCTION_SET, Float16)

}  // namespace dora_ext::cpu
