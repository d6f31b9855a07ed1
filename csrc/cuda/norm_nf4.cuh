// The norm of a W packed in NF4, and its fingerprint.
//
//   fp16, bf16; rank <= 64; in a multiple of 32   norm_rows_nf4.cuh, over packed bytes
//   else                                          a stretch of rows after the other is unpacked for the dense norm
#pragma once

#include <cmath>
#include <cstdlib>

#include "launches.cuh"
#include "norm_fingerprint.cuh"
#include "norm_rows_nf4.cuh"

namespace dora_ext {

template <typename T>
struct NormNf4Plan {
  void (*kernel)(NormProblem<T>, Nf4Matrix, int64_t) = nullptr;  // null: no tile fits
  int threads = 0;
  int64_t shared_bytes = 0;
  int64_t strips = 0;  // of columns: rows of partials
  Splits chunks{};     // of rows

  void launch(const NormProblem<T>& p, const Nf4Matrix& matrix, cudaStream_t stream) const {
    if (strips == 0) return;  // in = 0
    allow_shared(kernel, shared_bytes);
    const dim3 grid(static_cast<unsigned>(chunks.count), static_cast<unsigned>(strips));
    launch_beside(kernel, grid, threads, shared_bytes, stream, p, matrix, chunks.tiles);
  }
};

// Whether bf16's lora_A times it is exact; fp16 has too few exponents for that.
inline bool is_folded(float scaling) {
  int exponent = 0;
  return std::abs(std::frexp(scaling, &exponent)) == 0.5f && std::abs(exponent) <= 16;
}

// As many blocks run at once as their registers allow (kResident), and the shared memory of the device.
template <typename T, bool Folded, typename Tile, int kResident>
bool plan_rows_nf4(NormNf4Plan<T>& plan, const NormProblem<T>& p, const Nf4Matrix& matrix, int multiprocessors,
                   int64_t shared_limit) {
  using Shared = Nf4Shared<Tile>;
  constexpr int64_t kReserved = 1024;  // by the driver, for each block
  const int64_t resident = std::min<int64_t>(kResident, (shared_limit + kReserved) / (Shared::kOwn + kReserved));
  constexpr int kPair = 2 * Tile::kWidth;  // of a row, two lanes' weights: they share a scale
  if (p.rank > Tile::kRank || p.in % kPair != 0 || 1 << matrix.block_shift < kPair || resident == 0) return false;
  const int64_t left = (shared_limit + kReserved) / resident - kReserved - Shared::kOwn;
  const int64_t most = std::min<int64_t>(kMostRowTiles, left / (Shared::bytes(1) - Shared::kOwn));
  if (most == 0) return false;
  const int64_t strips = (p.in + Tile::kBlockColumns - 1) / Tile::kBlockColumns;
  const Splits chunks = split_walk(strips, (p.out + 15) / 16, resident * multiprocessors, most);
  const auto kernel = matrix.scales.nested_absmax != nullptr ? norm_nf4_rows_kernel<T, Tile, kResident, true, Folded>
                                                             : norm_nf4_rows_kernel<T, Tile, kResident, false, Folded>;
  plan = {kernel, Tile::kThreads, Shared::bytes(chunks.tiles), strips, chunks};
  return true;
}

template <typename T, bool Folded>
void plan_tiles_nf4(NormNf4Plan<T>& plan, const NormProblem<T>& p, const Nf4Matrix& matrix, int multiprocessors,
                    int64_t shared_limit) {
  // Rank 64: lora_B's rows take too much for several blocks. Not folded, a weight waits in a register for its product,
  // for which 16 warps have none left.
  using Highest = RowTile<4, Folded ? 16 : 8, 16, 1>;
  [[maybe_unused]] const bool planned =
      plan_rows_nf4<T, Folded, RowTile<1, 8, 32, 1>, 2>(plan, p, matrix, multiprocessors, shared_limit) ||
      plan_rows_nf4<T, Folded, RowTile<2, 8, 16, 1>, 2>(plan, p, matrix, multiprocessors, shared_limit) ||
      plan_rows_nf4<T, Folded, Highest, 1>(plan, p, matrix, multiprocessors, shared_limit);
}

template <typename T>
NormNf4Plan<T> plan_norm_nf4(const NormProblem<T>& p, const Nf4Matrix& matrix, int multiprocessors,
                             int64_t shared_limit) {
  NormNf4Plan<T> plan;
  if (p.in % 32 != 0 || (p.rank > 16 && p.rank % 8 != 0) || p.out * p.in >= int64_t{1} << 36) return plan;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (is_folded(p.scaling)) {
      plan_tiles_nf4<T, true>(plan, p, matrix, multiprocessors, shared_limit);
      return plan;
    }
  }
  plan_tiles_nf4<T, false>(plan, p, matrix, multiprocessors, shared_limit);
  return plan;
}

// ---------------------------------------------------------------------------------------------------------------------
// Unpacking for the dense norm

template <typename T, bool Nested>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_stale_nf4_kernel(const uint8_t* __restrict__ packed, Nf4Scales scales, int block_shift, int64_t numel,
                                T* __restrict__ out, const int64_t* fingerprint) {
  if (is_stale(fingerprint)) dequantize_block<T, Nested, false>(packed, scales, block_shift, numel, out);
}

template <typename T>
void launch_dequantize_stale_nf4(const uint8_t* packed, const Nf4Scales& scales, int block_shift, int64_t numel, T* out,
                                 const int64_t* fingerprint, cudaStream_t stream) {
  const int64_t blocks = (numel + kDequantizeBlock<T> - 1) / kDequantizeBlock<T>;
  if (blocks == 0) return;
  const auto kernel =
      scales.nested_absmax ? dequantize_stale_nf4_kernel<T, true> : dequantize_stale_nf4_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kDequantizeThreads, 0, stream>>>(packed, scales, block_shift, numel, out,
                                                                           fingerprint);
}

// ---------------------------------------------------------------------------------------------------------------------
// Fingerprint

struct Nf4Sizes {
  int64_t packed, absmax, nested;  // bytes, scales, scales of scales
  int64_t rows, columns;           // of bytes: where rows begin inside a byte, one row
};

// All bits of A, B and the scales, four packed bytes of every row and every column, and the numbers in `settings`.
template <typename T>
__global__ void __launch_bounds__(kFingerprintThreads)
    fingerprint_nf4_kernel(const uint8_t* packed, Nf4Scales scales, Nf4Sizes sizes, const T* lora_A, int64_t size_A,
                           const T* lora_B, int64_t size_B, double scaling, int64_t settings, int64_t epoch,
                           unsigned long long* fingerprint) {
  allow_next_launch();
  uint64_t hash = hash_all(lora_A, size_A, 1ull << 60) + hash_all(lora_B, size_B, 2ull << 60) +
                  hash_sample(packed, sizes.rows, sizes.columns, 3ull << 60);
  if (scales.nested_absmax == nullptr) {
    hash += hash_all(static_cast<const float*>(scales.absmax), sizes.absmax, 5ull << 60);
  } else {
    hash += hash_all(static_cast<const uint8_t*>(scales.absmax), sizes.absmax, 5ull << 60) +
            hash_all(scales.nested_absmax, sizes.nested, 6ull << 60) + hash_all(scales.code, 256, 7ull << 60);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    hash += mix_word(__double_as_longlong(scaling), 4ull << 60) + mix_word(settings, (4ull << 60) + 1) +
            mix_word(epoch, (4ull << 60) + 3);
    if (scales.offset != nullptr) hash += mix_word(__float_as_uint(*scales.offset), (4ull << 60) + 2);
  }
  settle_fingerprint(hash, fingerprint);
}

template <typename T>
void launch_fingerprint_nf4(const NormProblem<T>& p, const uint8_t* packed, const Nf4Scales& scales,
                            const Nf4Sizes& sizes, double scaling, int64_t settings, int64_t epoch,
                            int64_t* fingerprint, int multiprocessors, cudaStream_t stream) {
  const int64_t factors = p.rank * (p.in + p.out) * static_cast<int64_t>(sizeof(T)) / 8;
  const int64_t work = std::max({factors, 4 * (sizes.rows + sizes.columns), sizes.absmax / 2});
  fingerprint_nf4_kernel<T><<<fingerprint_blocks(work, multiprocessors), kFingerprintThreads, 0, stream>>>(
      packed, scales, sizes, p.lora_A, p.rank * p.pitch_A, p.lora_B, p.out * p.rank, scaling, settings, epoch,
      reinterpret_cast<unsigned long long*>(fingerprint));
}

}  // namespace dora_ext
