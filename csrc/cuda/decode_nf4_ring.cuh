// One token to eight over a W packed in NF4, where decode_ring.cuh brings it: what multiplies, what finishes, and the
// launch. On an H100 5 to 20% faster than decode_nf4.cuh, which has no TMA (docs/decode.md).
#pragma once

#include "decode_ring.cuh"
#include "tensor_map.cuh"

namespace dora_ext {

template <typename T>
__device__ __forceinline__ void decode_multiply(const DecodeProblem<T>& p, char* shared, const DecodeBarriers& barriers,
                                                int thread) {
  using R = DecodeRing;
  const int warp = thread / 32, lane = thread % 32, group = lane / 4, t = lane % 4;
  // The TMA swaps pieces of 16 bytes by the row: rows 0, 2, 4, 6 and rows 1, 3, 5, 7 meet no bank conflict together.
  const int row = group * 2 % 8 + group / 4;
  const T* token = p.x + static_cast<int64_t>(group) * p.in + 128 * warp + 16 * t;
  const uint32_t table = shared_address(shared) + R::kTable + 4 * lane;
  // The two weights of byte i of a word.
  const auto look_up = [&](uint32_t word, int i) {
    {
      uint32_t pair;  // not load_shared: nothing has to be kept in order with this
      asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(pair) : "r"(__byte_perm(word, table, 0x7604 | i << 4)));
      return pair;
    }
  };

  int buffer = 0;
  uint32_t parity = 1;
  float sum[4] = {};
  DecodeWalk at(p);
  while (at.here()) {
    const bool inside = at.column + 128 * warp < p.in;  // for all 128: `in` is a multiple of 256
    uint4 x[2][2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int i = 0; i < 2; ++i) x[q][i] = load16_if(inside && group < p.tokens, token + at.column + 64 * q + 8 * i);
    }
    barrier_wait(barriers.codes + 8 * at.slot, at.parity);
    const char* stage = shared + R::stage(at.slot) + warp / 2 * (kDecodeRows * 128) + row * 128 + t % 2 * 8;
    uint2 upper[2], lower[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const char* piece = stage + ((warp % 2 * 4 + 2 * q + t / 2) ^ row) * 16;
      upper[q] = *reinterpret_cast<const uint2*>(piece);
      lower[q] = *reinterpret_cast<const uint2*>(piece + 8 * 128);
    }
    float product[2][4] = {};
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      // Asked for each 64 columns, though all 128 are inside or none: the look-ups of both at once took a tenth longer.
      if (at.column + 128 * warp + 64 * q < p.in) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const uint32_t u = m < 2 ? upper[q].x : upper[q].y, l = m < 2 ? lower[q].x : lower[q].y;
          const int i = m % 2 * 2;
          const uint32_t a[4] = {look_up(u, i), look_up(l, i), look_up(u, i + 1), look_up(l, i + 1)};
          const uint32_t b[2] = {word_of(x[q][m / 2], i), word_of(x[q][m / 2], i + 1)};
          mma_m16n8k16<T>(product[q], a, b);
        }
      }
    }
    barrier_wait(barriers.scales + 8 * at.slot, at.parity);
    const char* scales = shared + R::kScales + at.slot * R::kScaleBytes + 4 * (row * R::kScalePitch + 2 * warp);
    const float2 top = *reinterpret_cast<const float2*>(scales);
    const float2 bottom = *reinterpret_cast<const float2*>(scales + 4 * 8 * R::kScalePitch);
    some_arrive<R::kReadScales>(kDecodeScalesRead + at.slot);
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.freed + 8 * at.slot);
    if (inside) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 scale = i < 2 ? top : bottom;
        sum[i] = fmaf(scale.x, product[0][i], fmaf(scale.y, product[1][i], sum[i]));
      }
    }
    if (at.next()) {
      barrier_wait(barriers.taken + 8 * buffer, parity);
      float* own = reinterpret_cast<float*>(shared + R::kSums + buffer * R::sum_bytes(p.tokens)) +
                   warp * p.tokens * kDecodeSumPitch;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (2 * t + i % 2 < p.tokens) own[(2 * t + i % 2) * kDecodeSumPitch + row + i / 2 * 8] = sum[i];
        sum[i] = 0;
      }
      barrier_arrive(barriers.sums + 8 * buffer);
      parity ^= buffer;
      buffer ^= 1;
    }
  }
}

template <typename T>
__device__ __forceinline__ void decode_finish(const DecodeProblem<T>& p, const float* parts, char* shared,
                                              const DecodeBarriers& barriers, int thread) {
  using R = DecodeRing;
  constexpr int kLanes = 32 * R::kFinishWarps / kDecodeRows;
  const int step = static_cast<int>(gridDim.x) * kDecodeRows;
  DecodeWalk at(p);
  const auto bring = [&](const FeatureVector& v, int first, int64_t numbers_per_row) {
    const int64_t size = numbers_per_row * (v.dtype == Dtype::kFloat ? 4 : 2), rows = p.out - first;
    const char* from = static_cast<const char*>(v.data) + first * size;
    const int64_t bytes = (rows < kDecodeRows ? rows : kDecodeRows) * size;
    for (int64_t i = 128 * thread; i < bytes; i += 128 * 32 * R::kFinishWarps) prefetch_to_l2(from + i);
  };
  for (int first = at.first; first < p.out; first += step) {  // all that is not W: later it would be queued behind W
    bring(p.lora_B, first, p.rank);
    bring(p.gain, first, 1);
    if (p.bias.data != nullptr) bring(p.bias, first, 1);
  }
  DecodeEnd<T, kLanes> next(p, at.first, thread);
  wait_for_previous_launch();
  allow_next_launch();
  float* const hidden = reinterpret_cast<float*>(shared + R::kSums + 2 * R::sum_bytes(p.tokens));
  for (int i = thread; i < p.tokens * p.rank; i += 32 * R::kFinishWarps) {
    float h = 0;
#pragma unroll 8
    for (int slice = 0; slice < (p.in + kDecodeSlice - 1) / kDecodeSlice; ++slice) {
      h += parts[slice * (p.tokens * p.rank) + i];
    }
    hidden[i] = h;
    if (blockIdx.x == 0) p.h[i] = narrow<T>(h);
  }
  warpgroup_sync(kDecodeFinish);

  int buffer = 0;
  uint32_t parity = 0;
  for (; at.here(); at.first += step) {
    const DecodeEnd<T, kLanes> end = next;
    next = DecodeEnd<T, kLanes>(p, at.first + step, thread);
    const float of_adapter = end.of_adapter(p, [&](int token, int i) { return hidden[token * p.rank + i]; });
    barrier_wait(barriers.sums + 8 * buffer, parity);
    const float* sums = reinterpret_cast<const float*>(shared + R::kSums + buffer * R::sum_bytes(p.tokens)) +
                        end.lane() * kDecodeSumPitch + thread / kLanes;
    float u = 0;
    if (end.lane() < p.tokens) {
#pragma unroll
      for (int warp = 0; warp < R::kMultiplyWarps; ++warp) u += sums[warp * p.tokens * kDecodeSumPitch];
    }
    barrier_arrive(barriers.taken + 8 * buffer);
    end.write(p, u / kDecodeCodeFactor<T>, of_adapter);
    parity ^= buffer;
    buffer ^= 1;
  }
}

// The bounds are those of more threads than there are, so that registers are left for a block of the launch before.
template <typename T>
__global__ void __launch_bounds__(1024, 1) decode_ring_kernel(DecodeProblem<T> p, Nf4Scales scales, const float* parts,
                                                              const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using R = DecodeRing;
  extern __shared__ __align__(1024) char shared[];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const DecodeBarriers barriers(shared_address(shared) + R::kBarriers);
  if (warp == R::kMultiplyWarps) {  // asks for the first stages while the others fill the table
    if (thread % 32 == 0) barriers.init();
    __syncwarp();
    some_arrive<R::kThreads>(kDecodeReady);
    decode_fetch(p, scales, &map, shared, barriers);
    return;
  }
  if (warp < R::kMultiplyWarps) {  // two threads have an entry of the table
    const int entry = thread / 2;
    const uint32_t pair = pack<T>(kNf4Device.value[entry / 16] * kDecodeCodeFactor<T>,
                                  kNf4Device.value[entry % 16] * kDecodeCodeFactor<T>);
    auto* const to = reinterpret_cast<uint4*>(shared + R::kTable + 256 * entry);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[(thread % 2 * 4 + i + entry) % 8] = make_uint4(pair, pair, pair, pair);
  }
  some_sync<R::kThreads>(kDecodeReady);
  if (warp < R::kMultiplyWarps) {
    decode_multiply(p, shared, barriers, thread);
  } else if (warp <= R::kMultiplyWarps + R::kScaleWarps) {
    decode_scale(p, scales, shared, barriers, thread - 32 * (R::kMultiplyWarps + 1));
  } else {
    decode_finish(p, parts, shared, barriers, thread - 32 * (R::kMultiplyWarps + 1 + R::kScaleWarps));
  }
#endif
}

// What the ring takes of what decode_nf4_fits: boxes of 256 columns, four scales at once and no more than two nested
// ones in a stage, and shared memory that begins where the table's place is counted from.
template <typename T>
bool decode_ring_fits(const DecodeProblem<T>& p, const Nf4Scales& scales, int64_t blocksize, int64_t shared_limit,
                      int reserved_shared) {
  return attributes_of(decode_ring_kernel<T>).ptxVersion >= 90 && map_encoder() != nullptr && blocksize == 64 &&
         (std::is_same_v<T, __nv_bfloat16> || p.lora_A.dtype != Dtype::kFloat) && p.in % DecodeRing::kBox == 0 &&
         p.out <= 1 << 30 && scales.first_block == 0 &&
         reinterpret_cast<uintptr_t>(scales.absmax) % (scales.nested_absmax == nullptr ? 16 : 4) == 0 &&
         (scales.nested_absmax == nullptr || scales.nested_shift >= 5) && reserved_shared == DecodeRing::kStart &&
         DecodeRing::shared_bytes(p.tokens, p.rank) <= shared_limit;
}

// Where the ring wins, whatever the number of tokens, since a token's bits must not depend on others: not where it has
// few columns (1024 -> 4096: 6.1 against 4.9 us), nor where many multiprocessors have nothing in the last round
// (4096 -> 11008, 5.2 rounds: 17.0 against 16.5 for one token, 25 against 22 for eight).
template <typename T>
bool prefers_ring(const DecodeProblem<T>& p, int multiprocessors) {
  const int64_t tiles = (p.out + kDecodeRows - 1) / kDecodeRows;
  const int64_t rounds = (tiles + multiprocessors - 1) / multiprocessors;
  return p.in >= 2048 && (rounds == 1 || 10 * tiles >= 9 * rounds * multiprocessors);
}

template <typename T>
cudaError_t launch_decode_ring(const DecodeProblem<T>& p, const uint8_t* packed, const Nf4Scales& scales, float* parts,
                               int multiprocessors, cudaStream_t stream) {
  using R = DecodeRing;
  CUtensorMap map;
  if (!encode_packed_map(&map, packed, p.in, p.out, kDecodeRows, R::kColumns / R::kBox)) return cudaErrorInvalidValue;
  launch_decode_slices(p, parts, stream);
  constexpr auto kernel = decode_ring_kernel<T>;
  const int64_t tiles = (p.out + kDecodeRows - 1) / kDecodeRows;
  // One token's x needs little of L1: asking for more than there is use for leaves multiprocessors divided as they are
  // for all launches, which takes 5% less.
  const int64_t used = R::shared_bytes(p.tokens, p.rank),
                shared = p.tokens == 1 ? std::max(used, int64_t{200 << 10}) : used;
  allow_shared(kernel, shared);
  launch_beside(kernel, static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors)), R::kThreads, shared, stream,
                p, scales, static_cast<const float*>(parts), map);
  return cudaSuccess;  // what a launch says is asked for after it
}

}  // namespace dora_ext
