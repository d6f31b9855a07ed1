// The norm of a W packed in NF4, and its fingerprint.
//
//   fp16, bf16; rank <= 64; in a multiple of 32   norm_nf4_kernel, over packed bytes
//   else                                          a stretch of rows after the other is unpacked for the dense norm
#pragma once

#include "low_rank_nf4.cuh"
#include "norm_fingerprint.cuh"
#include "norm_low_rank.cuh"

namespace dora_ext {

template <typename T, int KT, int WM, int WN>
using Nf4Tile = LowRankShape<KT, WM, WN, 2, Nf4Source<T>>;

// Blocks on a multiprocessor that registers are kept for. sm_75 needs them to do what it has no instructions for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kNf4Resident = 2;
#else
constexpr int kNf4Resident = 3;
#endif

template <typename T, int KT, int WM, int WN>
__global__ void __launch_bounds__(32 * WM * WN, KT == 1 ? kNf4Resident : 2)
    norm_nf4_kernel(NormProblem<T> p, Nf4Matrix matrix, int64_t tiles_per_split) {
  using Tile = Nf4Tile<T, KT, WM, WN>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  if (Tile::kSharedBytes > kSharedLimit || !is_stale(p.fingerprint)) return;
  Nf4Source<T> source{p, matrix};
  SquareSink<T> sink;
  walk_low_rank<Tile>(p, tiles_per_split, shared_bytes, source, sink);
  write_partials<WM, WN>(p, sink.sums, reinterpret_cast<float*>(shared_bytes),
                         static_cast<int64_t>(blockIdx.x) * Tile::kFeatures);
}

template <typename T>
using NormNf4Plan = LowRankPlan<void(NormProblem<T>, Nf4Matrix, int64_t)>;

template <typename T>
NormNf4Plan<T> plan_norm_nf4(const NormProblem<T>& p, int multiprocessors, int64_t shared_limit) {
  NormNf4Plan<T> plan;
  const auto plan_tile = [&](auto tile, auto* kernel, int resident) {
    return plan_low_rank_tile<decltype(tile)>(plan, kernel, p.rank, p.out, p.in, resident, multiprocessors,
                                              shared_limit);
  };
  [[maybe_unused]] const bool planned = plan_tile(Nf4Tile<T, 1, 1, 8>{}, norm_nf4_kernel<T, 1, 1, 8>, 3) ||
                                        plan_tile(Nf4Tile<T, 2, 1, 8>{}, norm_nf4_kernel<T, 2, 1, 8>, 2) ||
                                        plan_tile(Nf4Tile<T, 4, 2, 4>{}, norm_nf4_kernel<T, 4, 2, 4>, 2);
  return plan;
}

// ---------------------------------------------------------------------------------------------------------------------
// Unpacking for the dense norm

template <typename T, bool Nested>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_stale_nf4_kernel(const uint8_t* __restrict__ packed, Nf4Scales scales, int block_shift, int64_t numel,
                                T* __restrict__ out, const int64_t* fingerprint) {
  if (is_stale(fingerprint)) dequantize_block<T, Nested>(packed, scales, block_shift, numel, out);
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
                           const T* lora_B, int64_t size_B, double scaling, int64_t settings,
                           unsigned long long* fingerprint) {
  uint64_t hash = hash_all(lora_A, size_A, 1ull << 60) + hash_all(lora_B, size_B, 2ull << 60) +
                  hash_sample(packed, sizes.rows, sizes.columns, 3ull << 60);
  if (scales.nested_absmax == nullptr) {
    hash += hash_all(static_cast<const float*>(scales.absmax), sizes.absmax, 5ull << 60);
  } else {
    hash += hash_all(static_cast<const uint8_t*>(scales.absmax), sizes.absmax, 5ull << 60) +
            hash_all(scales.nested_absmax, sizes.nested, 6ull << 60) + hash_all(scales.code, 256, 7ull << 60);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    hash += mix_word(__double_as_longlong(scaling), 4ull << 60) + mix_word(settings, (4ull << 60) + 1);
    if (scales.offset != nullptr) hash += mix_word(__float_as_uint(*scales.offset), (4ull << 60) + 2);
  }
  settle_fingerprint(hash, fingerprint);
}

template <typename T>
void launch_fingerprint_nf4(const NormProblem<T>& p, const uint8_t* packed, const Nf4Scales& scales,
                            const Nf4Sizes& sizes, double scaling, int64_t settings, int64_t* fingerprint,
                            int multiprocessors, cudaStream_t stream) {
  const int64_t factors = p.rank * (p.in + p.out) * static_cast<int64_t>(sizeof(T)) / 8;
  const int64_t work = std::max({factors, 4 * (sizes.rows + sizes.columns), sizes.absmax / 2});
  fingerprint_nf4_kernel<T><<<fingerprint_blocks(work, multiprocessors), kFingerprintThreads, 0, stream>>>(
      packed, scales, sizes, p.lora_A, p.rank * p.pitch_A, p.lora_B, p.out * p.rank, scaling, settings,
      reinterpret_cast<unsigned long long*>(fingerprint));
}

}  // namespace dora_ext
