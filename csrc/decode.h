// What the decode kernels (cuda/decode.cuh) take, for their launchers, their checks, and the ops that choose between
// them and library products. They read rows of W 16 bytes at a time; what doesn't fit goes the way of more tokens.
#pragma once

#include <cstdint>

namespace dora_ext {

constexpr int kDecodeTokens = 8, kDecodeRows = 16;  // that a thread block has
constexpr int64_t kDecodeMostColumns = 1 << 26;

constexpr bool decode_fits_sizes(int64_t tokens, int64_t in, int64_t out) {
  return tokens >= 1 && tokens <= kDecodeTokens && in >= 1 && in <= kDecodeMostColumns && in % 8 == 0 && out >= 1;
}

// A group of 64 columns of a row has one scale.
constexpr bool decode_nf4_fits_sizes(int64_t tokens, int64_t in, int64_t out, int64_t blocksize) {
  return decode_fits_sizes(tokens, in, out) && in % 64 == 0 && blocksize >= 64;
}

}  // namespace dora_ext
