// Tells on the device whether A, B, the scaling or a sample of W changed since the norms in a cache were computed.
//
// A 64-bit hash per word and position, added up in integers: exact whatever the order, so integer atomics keep it
// deterministic. All bits of A and B are hashed; of W, which an adapter's training leaves alone, a few numbers of every
// row and of every column. Calls on one fingerprint must be ordered by the stream, as all use of a tensor must.
#pragma once

#include "norm_common.cuh"

namespace dora_ext {

// splitmix64's mixer: every bit of v changes every bit of the result. position keeps equal words apart.
__device__ __forceinline__ uint64_t mix_word(uint64_t v, uint64_t position) {
  v += (position + 1) * 0x9e3779b97f4a7c15ull;
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
  return v ^ (v >> 31);
}

template <typename T>
__device__ __forceinline__ uint64_t bits_of(T v) {
  if constexpr (sizeof(T) == 1) {
    return v;
  } else if constexpr (sizeof(T) == 2) {
    return *reinterpret_cast<const unsigned short*>(&v);
  } else if constexpr (sizeof(T) == 4) {
    return *reinterpret_cast<const unsigned int*>(&v);
  } else {
    return *reinterpret_cast<const unsigned long long*>(&v);
  }
}

// This thread's share of the hash of v (size,). Words of 8 bytes where v lies on them, else number by number.
template <typename T>
__device__ __forceinline__ uint64_t hash_all(const T* v, int64_t size, uint64_t salt) {
  constexpr int kPerWord = 8 / sizeof(T);
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t threads = gridDim.x * static_cast<int64_t>(blockDim.x);
  const int64_t words = reinterpret_cast<uintptr_t>(v) % 8 == 0 ? size / kPerWord : 0;
  uint64_t hash = 0;
  for (int64_t i = thread; i < words; i += threads) {
    hash += mix_word(reinterpret_cast<const uint64_t*>(v)[i], salt + i);
  }
  for (int64_t i = words * kPerWord + thread; i < size; i += threads) hash += mix_word(bits_of(v[i]), ~salt - i);
  return hash;
}

// lora_A or lora_B as fp32 numbers, of which it is to be made on the way; null: it is there already.
template <typename T>
__device__ __forceinline__ uint64_t hash_factor(T* v, int64_t size, uint64_t salt, const float* wide) {
  if constexpr (sizeof(T) == 2) {
    if (wide != nullptr) {
      const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
      const int64_t threads = gridDim.x * static_cast<int64_t>(blockDim.x);
      uint64_t hash = 0;
      for (int64_t i = thread; i < size / 4; i += threads) {
        const uint64_t word = narrow_four<T>(reinterpret_cast<const float4*>(wide)[i]);
        reinterpret_cast<uint64_t*>(v)[i] = word;
        hash += mix_word(word, salt + i);
      }
      return hash;
    }
  }
  return hash_all(v, size, salt);
}

// Four numbers of every row and four of every column of W (rows, columns). Neighbouring columns share their row, so
// that a warp reads one stretch of memory.
template <typename T>
__device__ __forceinline__ uint64_t hash_sample(const T* v, int64_t rows, int64_t columns, uint64_t salt) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t threads = gridDim.x * static_cast<int64_t>(blockDim.x);
  uint64_t hash = 0;
  if (rows == 0 || columns == 0) return hash;
  for (int64_t i = thread; i < 4 * (rows + columns); i += threads) {
    int64_t row, column;
    if (i < 4 * rows) {
      row = i / 4;
      column = (i % 4 * columns / 4 + 17 * row) % columns;
    } else {
      const int64_t c = i - 4 * rows;
      column = c % columns;
      row = (c / columns * rows / 4 + 17 * (column / 32)) % rows;
    }
    hash += mix_word(bits_of(v[row * columns + column]), salt + i);
  }
  return hash;
}

// Adds up what all threads have hashed. Leaves in `fingerprint` (int64[4], norm_common.cuh) whether the cached norms
// are stale; zeros at first mean that there are none.
__device__ __forceinline__ void settle_fingerprint(uint64_t hash, unsigned long long* fingerprint) {
  __shared__ unsigned long long block_hash;
  if (threadIdx.x == 0) block_hash = 0;
  __syncthreads();
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) hash += __shfl_xor_sync(~0u, hash, offset);
  if (threadIdx.x % 32 == 0) atomicAdd(&block_hash, static_cast<unsigned long long>(hash));
  __syncthreads();
  if (threadIdx.x != 0) return;

  atomicAdd(fingerprint + 1, block_hash);
  __threadfence();
  // The low half counts blocks; the high half still holds the last call's verdict, which a carry never reaches.
  const auto ticket = atomicAdd(reinterpret_cast<unsigned int*>(fingerprint + 2), 1u);
  if (ticket + 1 != gridDim.x) return;
  __threadfence();
  const unsigned long long sum = atomicExch(fingerprint + 1, 0ull);
  const unsigned long long now = sum == 0 ? 1 : sum;  // 0 stands for "never computed"
  const bool stale = now != fingerprint[0];
  fingerprint[0] = now;
  fingerprint[2] = stale ? 1ull << 32 : 0ull;
  fingerprint[3] += stale;
}

constexpr int kFingerprintThreads = 256;

// `work`: hashed words in all.
inline unsigned fingerprint_blocks(int64_t work, int multiprocessors) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((work + kFingerprintThreads - 1) / kFingerprintThreads, 1, 4 * multiprocessors));
}

// A and B in fp32, contiguous, of multiples of 4 numbers, on 16 bytes; null where there is nothing to be made.
struct WideFactors {
  const float *A = nullptr, *B = nullptr;
};

// W (rows, columns) as it lies in memory, A (rank, in), B (out, rank).
template <typename T>
__global__ void __launch_bounds__(kFingerprintThreads)
    fingerprint_kernel(const T* weight, int64_t rows, int64_t columns, T* lora_A, int64_t size_A, T* lora_B,
                       int64_t size_B, WideFactors wide, double scaling, int64_t epoch,
                       unsigned long long* fingerprint) {
  allow_next_launch();
  uint64_t hash = hash_factor(lora_A, size_A, 1ull << 60, wide.A) + hash_factor(lora_B, size_B, 2ull << 60, wide.B) +
                  hash_sample(weight, rows, columns, 3ull << 60);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    hash += mix_word(__double_as_longlong(scaling), 4ull << 60) + mix_word(epoch, (4ull << 60) + 1);
  }
  settle_fingerprint(hash, fingerprint);
}

template <typename T>
void launch_fingerprint(const NormProblem<T>& p, const WideFactors& wide, bool transposed, double scaling,
                        int64_t epoch, int64_t* fingerprint, int multiprocessors, cudaStream_t stream) {
  const int64_t rows = transposed ? p.in : p.out, columns = transposed ? p.out : p.in;
  const int64_t work = std::max<int64_t>(p.rank * (p.in + p.out) * sizeof(T) / 8, 4 * (rows + columns));
  fingerprint_kernel<T><<<fingerprint_blocks(work, multiprocessors), kFingerprintThreads, 0, stream>>>(
      p.weight, rows, columns, const_cast<T*>(p.lora_A), p.rank * p.pitch_A, const_cast<T*>(p.lora_B), p.out * p.rank,
      wide, scaling, epoch, reinterpret_cast<unsigned long long*>(fingerprint));
}

}  // namespace dora_ext
