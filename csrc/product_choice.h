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
