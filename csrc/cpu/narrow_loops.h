// A wide matrix times a narrow one, x (rows, columns) N (columns, r), for one instruction set; included by loops.h. The
// ranks lie along the vectors and x is broadcast element by element as it is stored: libraries, which copy x into
// panels of their own first, take about twice the time for this shape.

constexpr int64_t kSumLength = 64;  // of one chain of additions: long float chains lose bits

// out[i, j] = sum_k x[i, k] panel[k, j] for R rows and NV vectors of ranks, of which `width` numbers exist.
template <typename T, int R, int NV>
inline void narrow_tile(T* out, int64_t out_ld, const T* x, int64_t ld, int64_t columns, const T* panel,
                        int64_t width) {
  using V = Vector<T>;
  V total[R][NV] = {};
  for (int64_t first = 0; first < columns; first += kSumLength) {
    V sum[R][NV] = {};
    const int64_t end = min(first + kSumLength, columns);
    for (int64_t k = first; k < end; ++k) {
      V n[NV];
      for (int v = 0; v < NV; ++v) n[v] = load(panel + (k * NV + v) * kLanes<T>);
      for (int i = 0; i < R; ++i) {
        const V xi = x[i * ld + k] - V{};
        for (int v = 0; v < NV; ++v) sum[i][v] += xi * n[v];
      }
    }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < NV; ++v) total[i][v] += sum[i][v];
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < NV; ++v) store_first(out + i * out_ld + v * kLanes<T>, total[i][v], width - v * kLanes<T>);
}

template <typename T, int NV>
inline void narrow_panels(T* out, const T* x, int64_t ld, int64_t rows, int64_t columns, const T* panels, int64_t r) {
  // As many sums as a tile of the other loops has, but at least the 8 chains that hide an addition's latency.
  constexpr int R = NV == 1 ? 8 : TILE_ROWS;
  for (int64_t first = 0; first < r; first += NV * kLanes<T>, panels += columns * NV * kLanes<T>) {
    int64_t i = 0;
    for (; i + R <= rows; i += R)
      narrow_tile<T, R, NV>(out + i * r + first, r, x + i * ld, ld, columns, panels, r - first);
    for (; i < rows; ++i) narrow_tile<T, 1, NV>(out + i * r + first, r, x + i * ld, ld, columns, panels, r - first);
  }
}

// The half-precision types are left to the library, whose products of them use other instructions.
template <typename T>
void multiply_narrow(T* out, const T* x, int64_t ld, int64_t rows, int64_t columns, const acc_type<T>* panels,
                     int64_t r, int64_t vectors) {
  if constexpr (sizeof(T) == sizeof(acc_type<T>)) {
    if (vectors == 1) return narrow_panels<T, 1>(out, x, ld, rows, columns, panels, r);
    narrow_panels<T, 2>(out, x, ld, rows, columns, panels, r);
  }
}

// out (r, width) += N^T X; N (rows, r), X (rows, width) packed in one panel. A quarter less time than the library's.
template <typename T, int R>
inline void transposed_tile(T* out, int64_t out_ld, const T* narrow, int64_t r, const T* panel, int64_t rows,
                            int64_t width) {
  using Tile = Tile<T, R, false>;
  Vector<T> total[R][Tile::C], sum[R][Tile::C];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < Tile::C; ++j) total[i][j] = Tile::load_at(out + i * out_ld, j, width);
  for (int64_t first = 0; first < rows; first += kSumLength) {
    const int64_t length = min(kSumLength, rows - first);
    Tile::low_rank(sum, {narrow + first * r, 1, r, length, panel + first * kPanel<T>}, 0, 0);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < Tile::C; ++j) total[i][j] += sum[i][j];
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < Tile::C; ++j) Tile::store_at(out + i * out_ld, j, width, total[i][j]);
}

template <typename T>
void add_transposed_narrow(T* out, int64_t out_ld, const acc_type<T>* narrow, int64_t r, const acc_type<T>* panel,
                           int64_t rows, int64_t width) {
  if constexpr (sizeof(T) == sizeof(acc_type<T>)) {
    int64_t i = 0;
    for (; i + TILE_ROWS <= r; i += TILE_ROWS)
      transposed_tile<T, TILE_ROWS>(out + i * out_ld, out_ld, narrow + i, r, panel, rows, width);
    for (; i < r; ++i) transposed_tile<T, 1>(out + i * out_ld, out_ld, narrow + i, r, panel, rows, width);
  }
}
