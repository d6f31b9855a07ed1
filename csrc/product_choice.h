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

// In how many stretches of how many rows of tiles a product makes h first (product_first.cuh). A row of tiles, 256 rows
// of h, takes a pair of blocks 12 us at k = 4096: more than two of them, and tiles wait for h; more than eight pairs at
// once, and they take the memory from those that multiply. None where the last round leaves too few pairs idle.
struct Stretches {
  int64_t count, rows_of_tiles;  // rows of tiles in each
};
inline Stretches choose_stretches(int64_t rows, int64_t columns, int64_t multiprocessors) {
  constexpr int64_t kPairs = 8, kLongest = 2, kMost = 128;
  const int64_t width = choose_product(rows, columns, multiprocessors).width, pairs = multiprocessors / 2;
  const int64_t rows_of_tiles = (rows + 255) / 256, tiles = rows_of_tiles * ((columns + width - 1) / width);
  const int64_t idle = std::min(kMost, product_rounds(rows, columns, width, multiprocessors) * pairs - tiles);
  for (int64_t stretch = std::min(kLongest, (rows_of_tiles + kPairs - 1) / kPairs); stretch <= kLongest; ++stretch) {
    const int64_t count = (rows_of_tiles + stretch - 1) / stretch;
    if (count <= idle) return {count, stretch};
  }
  return {0, 0};
}

// Should a product of rows x columns x inner make dA = P^T x last (product_last.cuh), in stretches of 256 columns a
// pair of blocks? It should where what they stand out beyond the last round takes less time than a pass over x behind
// the product. All pairs together read 2.5 MB of x a us; one is kept back by what it has to multiply.
constexpr int64_t kColumnsOfStretch = 256;
inline int64_t choose_last_stretches(int64_t rows, int64_t columns, int64_t inner, int64_t rank,
                                     int64_t multiprocessors) {
  if (choose_product(rows, columns, multiprocessors).width != 256) return 0;
  const int64_t pairs = multiprocessors / 2, tiles = (rows + 255) / 256 * ((columns + 255) / 256);
  const int64_t idle = product_rounds(rows, columns, 256, multiprocessors) * pairs - tiles;
  const int64_t count = (columns + kColumnsOfStretch - 1) / kColumnsOfStretch;
  if (idle == 0) return 0;
  const double rate = rank <= 16 ? 0.2 : rank <= 32 ? 0.14 : 0.08;
  const double megabytes = 2e-6 * static_cast<double>(rows) * static_cast<double>(columns);
  const double turns = static_cast<double>((count + idle - 1) / idle);
  const double all = std::max(turns * 2e-6 * static_cast<double>(rows * kColumnsOfStretch) / rate, megabytes / 2.5);
  const double round = 50.0 / 4096 * static_cast<double>(inner), behind = 3 + megabytes / 2.5;
  return all - round < behind ? count : 0;
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
