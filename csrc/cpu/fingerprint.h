// A 64-bit fingerprint of everything that a norm depends on, for the cache that checks itself.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace dora_ext::cpu {

class Fingerprint {
 public:
  void add_bytes(const void* bytes, int64_t count) {
    const char* p = static_cast<const char*>(bytes);
    constexpr int64_t kStep = 16 * kLanes;
    for (; count >= kStep; p += kStep, count -= kStep)
      for (int lane = 0; lane < kLanes; ++lane) mix(lane, word(p + 16 * lane), word(p + 16 * lane + 8));
    char rest[kStep] = {};
    std::memcpy(rest, p, count);
    for (int lane = 0; lane < kLanes; ++lane) mix(lane, word(rest + 16 * lane), word(rest + 16 * lane + 8));
    mix(0, count, 0);
  }

  // Every bit.
  void add(const Tensor& t) {
    const Tensor dense = t.contiguous();
    add_bytes(dense.const_data_ptr(), dense.nbytes());
  }

  // A piece of every row, shifted from row to row so that every column is met in several rows: one or two cache lines
  // a row. A training step that moves W moves nearly all of it.
  void add_sample(const Tensor& matrix) {
    const Tensor t = matrix.stride(1) == 1 ? matrix : matrix.stride(0) == 1 ? matrix.t() : matrix.contiguous();
    const int64_t rows = t.size(0), columns = t.size(1), size = t.element_size(), ld = t.stride(0) * size;
    if (rows == 0 || columns == 0) return;
    const int64_t piece = std::min(columns, std::max<int64_t>(16, 4 * ((columns + rows - 1) / rows)));
    const char* p = static_cast<const char*>(t.const_data_ptr());
    constexpr int64_t kAhead = 16;  // rows lie on pages of their own: nobody but us knows which comes next
    for (int64_t i = 0, first = 0; i < rows; ++i, p += ld, first = (first + piece) % columns) {
      if (i + kAhead < rows) __builtin_prefetch(p + kAhead * ld + (first + kAhead * piece) % columns * size);
      const int64_t here = std::min(piece, columns - first);
      add_bytes(p + first * size, here * size);
      add_bytes(p, (piece - here) * size);
    }
  }

  // Never 0, which stands for "nothing cached".
  int64_t value() const {
    uint64_t h = 0;
    for (int lane = 0; lane < kLanes; ++lane) h = product(h ^ lanes_[lane], kSecret[lane]);
    return static_cast<int64_t>(h ? h : 1);
  }

 private:
  static constexpr int kLanes = 4;  // independent products, so that their latencies overlap
  static constexpr uint64_t kSecret[kLanes] = {0x9e3779b97f4a7c15, 0xd6e8feb86659fd93, 0xa0761d6478bd642f,
                                               0xe7037ed1a0b428db};

  static uint64_t word(const char* p) {
    uint64_t w;
    std::memcpy(&w, p, sizeof(w));
    return w;
  }
  // Both halves of the 128-bit product: every input bit reaches every output bit, sign bits included.
  static uint64_t product(uint64_t a, uint64_t b) {
    const auto wide = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(wide) ^ static_cast<uint64_t>(wide >> 64);
  }
  void mix(int lane, uint64_t a, uint64_t b) { lanes_[lane] = product(a ^ kSecret[lane], b ^ lanes_[lane]); }

  uint64_t lanes_[kLanes] = {kSecret[1], kSecret[2], kSecret[3], kSecret[0]};
};

}  // namespace dora_ext::cpu
