// One token to eight over a W packed in NF4, where decode_ring.cuh brings it: what multiplies, what finishes, and the
// launch. For one token 10 to 25% faster than decode_nf4.cuh, which has no TMA (docs/decode.md).
#pragma once

#include "decode_ring.cuh"
#include "tensor_map.cuh"

namespace dora_ext {

// Which of eight rows a lane has. The TMA swaps pieces of 16 bytes by the row: rows 0, 2, 4, 6 and rows 1, 3, 5, 7 meet
// no bank conflict together.
__device__ __forceinline__ int decode_ring_row(int lane) {
  return lane / 4 * 2 % 8 + lane / 16;
}

// What multiplies is bound by how many instructions it issues. So half of the warps take every second stage, with 256
// columns each, rather than all of them every stage, and addresses are made once.
template <typename T>
__device__ __forceinline__ void decode_multiply(const DecodeProblem<T>& p, uint32_t shared,
                                                const DecodeBarriers& barriers, int thread) {
  using R = DecodeRing;
  const int warp = thread / 32, lane = thread % 32, group = lane / 4, t = lane % 4;
  const int box = warp % R::kStageWarps;
  const int row = decode_ring_row(lane);
  const bool is_token = group < p.tokens;
  const int token = group * p.in + R::kBox * box + 16 * t;
  const uint32_t table = shared + R::kTable + 4 * lane;
  const uint32_t codes_here = shared + box * (kDecodeRows * 128) + row * 128 + (t / 2 ^ row) * 16 + t % 2 * 8;
  const uint32_t scales_here = shared + R::kScales + 4 * (row * R::kScalePitch + 4 * box);
  // The two weights of byte i of a word.
  const auto look_up = [&](uint32_t word, int i) {
    uint32_t pair;  // not load_shared: nothing has to be kept in order with this
    asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(pair) : "r"(__byte_perm(word, table, 0x7604 | i << 4)));
    return pair;
  };

  int buffer = 0;
  uint32_t parity = 1;
  int others = warp / R::kStageWarps;  // stages until the next of its own
  float sum[4] = {};
  DecodeWalk at(p);
  while (at.here()) {
    if (others == 0 && at.column + R::kBox * box < p.in) {
      const T* const columns = p.x + (token + at.column);
      float product[4][4] = {};  // of 64 columns each
      const uint32_t codes = codes_here + R::stage(at.slot);
      barrier_wait(barriers.codes + 8 * at.slot, at.parity);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const uint4 x[2] = {load16_if(is_token, columns + 64 * q), load16_if(is_token, columns + 64 * q + 8)};
        const uint2 upper = load_shared_pair(codes ^ 32 * q), lower = load_shared_pair((codes ^ 32 * q) + 8 * 128);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const uint32_t u = m < 2 ? upper.x : upper.y, l = m < 2 ? lower.x : lower.y;
          const int i = m % 2 * 2;
          const uint32_t a[4] = {look_up(u, i), look_up(l, i), look_up(u, i + 1), look_up(l, i + 1)};
          const uint32_t b[2] = {word_of(x[m / 2], i), word_of(x[m / 2], i + 1)};
          mma_m16n8k16<T>(product[q], a, b);
        }
      }
      barrier_wait(barriers.scales + 8 * at.slot, at.parity);
      const uint32_t scales = scales_here + at.slot * R::kScaleBytes;
      const uint4 top = load_shared_four(scales), bottom = load_shared_four(scales + 4 * 8 * R::kScalePitch);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[i] = fmaf(__uint_as_float(word_of(i < 2 ? top : bottom, q)), product[q][i], sum[i]);
        }
      }
    }
    if (others == 0) {
      barrier_wait(barriers.scales + 8 * at.slot, at.parity);  // who has nothing inside may not be ahead of the others
      some_arrive<R::kReadScales>(kDecodeScalesRead + at.slot);
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers.freed + 8 * at.slot);
    }
    others = others == 0 ? R::kTurns - 1 : others - 1;
    if (at.next()) {
      barrier_wait(barriers.taken + 8 * buffer, parity);
      const int lane = thread_here() % 32, token0 = lane % 4 * 2;  // found here: no register need hold it
      const uint32_t to = shared + R::kSums + buffer * R::sum_bytes(p.tokens) +
                          4 * ((warp * p.tokens + token0) * kDecodeSumPitch + decode_ring_row(lane));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (token0 + i % 2 < p.tokens) store_shared(to + 4 * (i % 2 * kDecodeSumPitch + i / 2 * 8), sum[i]);
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
  const auto slices = static_cast<int>(decode_slices(p));
  float* const hidden = reinterpret_cast<float*>(shared + R::kSums + 2 * R::sum_bytes(p.tokens));
  for (int i = thread; i < p.tokens * p.rank; i += 32 * R::kFinishWarps) {
    float h = 0;
#pragma unroll 8
    for (int slice = 0; slice < slices; ++slice) h += parts[slice * (p.tokens * p.rank) + i];
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

// Registers are left for a block of the launch before.
template <bool Nested, typename T>
__global__ void __launch_bounds__(768) decode_ring_kernel(DecodeProblem<T> p, Nf4Scales scales, const float* parts,
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
    decode_fetch<Nested>(p, scales, &map, shared, barriers);
    return;
  }
  if (thread < 2 * 256) {  // two have an entry of the table
    const int entry = thread / 2;
    const uint32_t pair = pack<T>(kNf4Device.value[entry / 16] * kDecodeCodeFactor<T>,
                                  kNf4Device.value[entry % 16] * kDecodeCodeFactor<T>);
    auto* const to = reinterpret_cast<uint4*>(shared + R::kTable + 256 * entry);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[(thread % 2 * 4 + i + entry) % 8] = make_uint4(pair, pair, pair, pair);
  }
  some_sync<R::kThreads>(kDecodeReady);
  if (warp < R::kMultiplyWarps) {
    decode_multiply(p, shared_address(shared), barriers, thread);
  } else if (warp <= R::kMultiplyWarps + R::kScaleWarps) {
    decode_scale<Nested>(p, scales, shared, barriers, thread - 32 * (R::kMultiplyWarps + 1));
  } else {
    decode_finish(p, parts, shared, barriers, thread - 32 * (R::kMultiplyWarps + 1 + R::kScaleWarps));
  }
#endif
}

// What the ring takes, whatever the number of tokens, of what decode_nf4_fits: boxes of 256 columns, four scales at
// once and no more than two nested ones in a stage, and shared memory that begins where the table's place is counted
// from.
template <typename T>
bool decode_ring_fits(const DecodeProblem<T>& p, const Nf4Scales& scales, int64_t blocksize, int64_t shared_limit,
                      int reserved_shared) {
  return attributes_of(decode_ring_kernel<true, T>).ptxVersion >= 90 && map_encoder() != nullptr && blocksize == 64 &&
         (std::is_same_v<T, __nv_bfloat16> || p.lora_A.dtype != Dtype::kFloat) && p.in % DecodeRing::kBox == 0 &&
         p.out <= 1 << 30 && scales.first_block == 0 &&
         reinterpret_cast<uintptr_t>(scales.absmax) % (scales.nested_absmax == nullptr ? 16 : 4) == 0 &&
         (scales.nested_absmax == nullptr || scales.nested_shift >= 5) && reserved_shared == DecodeRing::kStart &&
         DecodeRing::shared_bytes(kDecodeTokens, p.rank) <= shared_limit;
}

// Where the ring wins, whatever the number of tokens, since a token's bits must not depend on others: not where it has
// few columns, nor where many multiprocessors have nothing in the last round (docs/decode.md).
template <typename T>
bool prefers_ring(const DecodeProblem<T>& p, int multiprocessors) {
  const int64_t tiles = (p.out + kDecodeRows - 1) / kDecodeRows;
  const int64_t rounds = (tiles + multiprocessors - 1) / multiprocessors;
  return p.in >= 2048 && (rounds == 1 || 20 * tiles >= 17 * rounds * multiprocessors);
}

template <typename T>
cudaError_t launch_decode_ring(const DecodeProblem<T>& p, const uint8_t* packed, const Nf4Scales& scales, float* parts,
                               int multiprocessors, cudaStream_t stream) {
  using R = DecodeRing;
  CUtensorMap map;
  if (!encode_packed_map(&map, packed, p.in, p.out, kDecodeRows, R::kColumns / R::kBox)) return cudaErrorInvalidValue;
  launch_decode_slices(p, parts, stream);
  const auto kernel = scales.nested_absmax != nullptr ? decode_ring_kernel<true, T> : decode_ring_kernel<false, T>;
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
