// hopper_product: which of its two tiles is done first, and where it is expected to beat the library's product with a
// pass over the result behind it. Measured on an H100: docs/hopper.md.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dora_ext {

// How often the GPU is filled with pairs of blocks, each pair having 256 rows of `width` columns.
inline int64_t product_rounds(int64_t rows, int64_t columns, int64_t width, int64_t multiprocessors) {
  const int64_t tiles = (rows + 255) / 256 * ((columns + width - 1) / width), pairs = multiprocessors / 2;
  return (tiles + pairs - 1) / pairs;
}

// In rounds of 128 columns, of which each takes 27.6 us at k = 4096; a round of 256 columns takes 50.
struct ProductChoice {
  int width;    // of the tile: 128 or 256 columns
  double cost;  // in rounds of 128 columns
};
inline ProductChoice choose_product(int64_t rows, int64_t columns, int64_t multiprocessors) {
  const double narrow = static_cast<double>(product_rounds(rows, columns, 128, multiprocessors));
  const double wide = 1.8 * static_cast<double>(product_rounds(rows, columns, 256, multiprocessors));
  return wide <= narrow ? ProductChoice{256, wide} : ProductChoice{128, narrow};
}

// What a product makes first (product_first.cuh), and by how many pairs of blocks. Its units are rows of tiles, 256
// rows of h, and columns of tiles, 256 norms. Beside tiles each takes a pair of blocks 23 us at k = 4096, more at a
// rank above 16, since it gets no more of the L2 cache than a tile does; and a tile asks for them after 47. None where
// the last round leaves too few pairs idle.
struct First {
  int64_t pairs = 0, of_h = 0, of_norms = 0;  // and how many units of each
};
inline First choose_first(int64_t rows, int64_t columns, int64_t rank, int64_t multiprocessors, bool want_norms) {
  constexpr int64_t kMostUnits = 256;
  const int64_t width = choose_product(rows, columns, multiprocessors).width, pairs = multiprocessors / 2;
  const int64_t of_h = (rows + 255) / 256, of_norms = (columns + 255) / 256;
  const int64_t tiles = of_h * ((columns + width - 1) / width);
  const int64_t idle = product_rounds(rows, columns, width, multiprocessors) * pairs - tiles;
  const auto fit = [&](int64_t h, int64_t norms, int64_t fewest, int64_t most) {
    for (int64_t each = fewest; each <= most && h + norms <= kMostUnits; ++each) {
      const int64_t count = (h + norms + each - 1) / each;
      if (count <= idle) return First{count, h, norms};
    }
    return First{};
  };
  First first;
  const bool norms = want_norms && width == 256;
  // Both, where W is not small beside x. Three units each at rank 64 take the GPU 2 % longer than a product
  // for h before this one; at rank 32 .5 %, and the host two launches less.
  if (norms && 2 * of_norms >= of_h) first = fit(of_h, of_norms, 2, rank <= 32 ? 3 : 2);
  if (norms && first.pairs == 0 && of_norms >= 2 * of_h) first = fit(0, of_norms, 2, 2);
  // More than eight pairs at once take the memory from those that multiply.
  if (first.pairs == 0) first = fit(of_h, 0, of_h <= 8 ? 1 : 2, 2);
  if (norms && first.pairs == 0 && rank <= 16) first = fit(0, of_norms, 2, 2);
  return first;
}

// In how many stretches, of 256 columns each, a product of rows x columns x inner makes dA = P^T x last
// (product_last.cuh); 0: behind it, as a pass over x, is faster. A pair of blocks reads 0.12 MB of x a us beside tiles
// and 0.2 after them, less where it has more to multiply. `spread`: where numbers are dealt out, over all pairs, those
// that the last round leaves idle first; else over these alone.
constexpr int64_t kColumnsOfStretch = 256;
struct Last {
  int64_t count = 0;
  bool spread = false;
};
inline Last choose_last(int64_t rows, int64_t columns, int64_t inner, int64_t rank, int64_t multiprocessors) {
  if (choose_product(rows, columns, multiprocessors).width != 256) return {};
  const int64_t pairs = multiprocessors / 2, tiles = (rows + 255) / 256 * ((columns + 255) / 256);
  const int64_t idle = product_rounds(rows, columns, 256, multiprocessors) * pairs - tiles;
  const int64_t count = (columns + kColumnsOfStretch - 1) / kColumnsOfStretch;
  if (idle == 0) return {};
  const double beside = rank <= 16 ? 0.115 : rank <= 32 ? 0.098 : 0.056, after = 1.7 * beside;
  const double megabytes = 2e-6 * static_cast<double>(rows) * static_cast<double>(columns);
  const double stretch = megabytes / static_cast<double>(count), round = 50.0 / 4096 * static_cast<double>(inner);
  const double stands_out = static_cast<double>((count + idle - 1) / idle) * stretch / beside - round;
  const double spread_out = count <= pairs ? stretch / after : 2 * stretch / after;
  const double behind = 5 + megabytes / 2.5;
  if (std::min(stands_out, spread_out) >= behind) return {};
  return {count, spread_out < stands_out};
}

// Is hopper_product with a tail expected to be done before a library product and the pass over its result that it
// spares? The library is taken to be as fast as a GPU full of our tiles, but to have tiles for few of them; the pass
// takes 2 us and 3.3 more for what a round computes. H100 and H200 have 132 multiprocessors.
inline bool hopper_product_wins(int64_t rows, int64_t columns, int64_t inner) {
  constexpr double kRound = 256.0 * 128 * 132 / 2;
  const double rounds = static_cast<double>(rows) * static_cast<double>(columns) / kRound;
  const double round_time = 27.6 / 4096 * static_cast<double>(inner), pass_time = 2 + 3.3 * rounds;
  return choose_product(rows, columns, 132).cost * round_time < rounds * round_time + pass_time;
}

}  // namespace dora_ext
