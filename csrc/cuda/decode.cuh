// A whole DoRA linear layer for 1 to 8 tokens: h = x A^T, y = g * (x W^T + s h B^T) + bias, W dense or packed in NF4.
//
// Two launches that overlap. The first has a thread block per row of A and is over in a few microseconds; the second
// streams W, which takes longer, and asks for h only at its end. On sm_90 it starts together with the first
// (programmatic dependent launch). One launch would have each block compute h again, and that is r rows of A beside the
// 16 rows of W that a block has.
//
// A block has 16 rows of W, its warps take turns along them, and their sums are added in the order of the warps: the
// same bits each time. The products run on the tensor cores with the tokens as the 8 columns; for one token that costs
// nothing, because reading W takes longer.
#pragma once

#include "decode_rows.cuh"

namespace dora_ext {

constexpr int kDecodeKeptRank = 64;  // of B and h in shared memory; beyond it they are read from where they are

template <typename T>
struct DecodeProblem {
  const T* x;            // (tokens, in), 16-byte aligned
  FeatureVector lora_A;  // (r, in), 16-byte aligned
  FeatureVector lora_B;  // (out, r)
  FeatureVector gain;    // (out,)
  FeatureVector bias;    // (out,) or null
  T* h;                  // (tokens, r)
  T* y;                  // (tokens, out)
  int tokens, in, rank;
  int64_t out;
  float scaling;
};

// ---------------------------------------------------------------------------------------------------------------------
// Programmatic dependent launch

// Waits until the launch before this one has finished and its results can be read. A no-op in an ordinary launch.
__device__ __forceinline__ void wait_for_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The next launch may start once all blocks of this one have come here.
__device__ __forceinline__ void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// h

constexpr int kDecodeAdapterThreads = 256;

// 8 numbers from 16-byte aligned memory, as floats.
__device__ __forceinline__ void load8(const FeatureVector& v, int64_t i, float (&out)[8]) {
  if (v.dtype == Dtype::kFloat) {
    const auto* p = reinterpret_cast<const float4*>(static_cast<const float*>(v.data) + i);
    const float4 a = p[0], b = p[1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(v.data) + i);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair =
          v.dtype == Dtype::kHalf ? unpack<__half>(word_of(words, k)) : unpack<__nv_bfloat16>(word_of(words, k));
      out[2 * k] = pair.x, out[2 * k + 1] = pair.y;
    }
  }
}

// Block i: h[:, i].
template <typename T>
__global__ void __launch_bounds__(kDecodeAdapterThreads) decode_adapter_kernel(DecodeProblem<T> p) {
  __shared__ float of_warp[kDecodeAdapterThreads / 32][kDecodeTokens];
  allow_next_launch();
  const int thread = static_cast<int>(threadIdx.x), row = static_cast<int>(blockIdx.x);
  float sum[kDecodeTokens] = {};
  for (int k = 8 * thread; k < p.in; k += 8 * kDecodeAdapterThreads) {
    float a[8];
    load8(p.lora_A, static_cast<int64_t>(row) * p.in + k, a);
#pragma unroll
    for (int token = 0; token < kDecodeTokens; ++token) {
      if (token < p.tokens) {
        const uint4 x = __ldg(reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(token) * p.in + k));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = unpack<T>(word_of(x, i));
          sum[token] = fmaf(a[2 * i], pair.x, fmaf(a[2 * i + 1], pair.y, sum[token]));
        }
      }
    }
  }
#pragma unroll
  for (int token = 0; token < kDecodeTokens; ++token) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum[token] += __shfl_xor_sync(~0u, sum[token], offset);
    if (thread % 32 == 0) of_warp[thread / 32][token] = sum[token];
  }
  __syncthreads();
  if (thread < p.tokens) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kDecodeAdapterThreads / 32; ++warp) total += of_warp[warp][thread];
    p.h[static_cast<int64_t>(thread) * p.rank + row] = narrow<T>(total);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// y

// Weight: DenseWeight or PackedWeight. kWarps divide the columns of 16 rows among them, each keeps kDepth steps in
// flight. Dynamic shared memory: the scales of a tile of a packed weight.
template <typename T, typename Weight, int kWarps, int kDepth, int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) decode_kernel(DecodeProblem<T> p, Weight weight) {
  constexpr int kThreads = 32 * kWarps, kStride = kWarps * Weight::kColumns;
  __shared__ float of_warp[kWarps][kDecodeTokens][kDecodeRows];
  __shared__ float B[kDecodeRows][kDecodeKeptRank + 1];
  __shared__ float h[kDecodeTokens][kDecodeKeptRank];
  extern __shared__ float scales[];
  static_assert(kThreads >= kDecodeTokens * kDecodeRows, "a thread per result");

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int group = thread % 32 / 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kDecodeRows;
  const int64_t end = first + kDecodeRows < p.out ? first + kDecodeRows : p.out;
  // The last tile may have fewer rows; what is read in their place is not written.
  const int64_t top = first + group < end ? first + group : end - 1;
  const int64_t bottom = first + group + 8 < end ? first + group + 8 : end - 1;
  const DecodeLane<T> lane{group < p.tokens ? p.x + static_cast<int64_t>(group) * p.in : nullptr, p.in, thread % 4};
  const auto tile = weight.tile(first, top, bottom, p.in);

  typename Weight::Step step[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) Weight::load(tile, lane, warp * Weight::kColumns + d * kStride, step[d]);

  // While these come: all that the end needs but h.
  const int token = thread / kDecodeRows, row = thread % kDecodeRows;
  const bool result = token < p.tokens && first + row < end;
  float gain = 0, bias = 0;
  if (result) {
    gain = p.gain.template at<float>(first + row);
    if (p.bias.data != nullptr) bias = p.bias.template at<float>(first + row);
  }
  const int kept = p.rank < kDecodeKeptRank ? p.rank : kDecodeKeptRank;
  for (int j = thread; j < kDecodeRows * kept; j += kThreads) {
    const int r = j / kept, i = j % kept;
    if (first + r < end) B[r][i] = p.lora_B.template at<float>((first + r) * p.rank + i);
  }
  weight.stage(first, end, p.in, scales);
  __syncthreads();

  const float lane_value = kNf4Device.value[thread % 16];
  float sum[4] = {};
  for (int column = warp * Weight::kColumns; column < p.in; column += kDepth * kStride) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const int at = column + d * kStride;
      if (at < p.in) weight.multiply(tile, lane, at, step[d], scales, lane_value, sum);
      Weight::load(tile, lane, at + kDepth * kStride, step[d]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) of_warp[warp][2 * lane.t + i % 2][group + i / 2 * 8] = sum[i];

  wait_for_previous_launch();
  for (int j = thread; j < p.tokens * kept; j += kThreads) {
    h[j / kept][j % kept] = widen(p.h[static_cast<int64_t>(j / kept) * p.rank + j % kept]);
  }
  __syncthreads();
  if (!result) return;
  float u = 0, adapter = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) u += of_warp[w][token][row];
  for (int i = 0; i < kept; ++i) adapter = fmaf(B[row][i], h[token][i], adapter);
  for (int i = kept; i < p.rank; ++i) {
    adapter = fmaf(p.lora_B.template at<float>((first + row) * p.rank + i),
                   widen(p.h[static_cast<int64_t>(token) * p.rank + i]), adapter);
  }
  p.y[token * p.out + first + row] = narrow<T>(fmaf(gain, fmaf(p.scaling, adapter, u), bias));
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch

// `kernel` beside the launch before it, where it was compiled to wait for that by itself.
template <typename... Args>
void launch_beside(void (*kernel)(Args...), unsigned blocks, unsigned threads, size_t shared, cudaStream_t stream,
                   Args... args) {
  // What the architecture of the device says is not enough: it may run code that was compiled for an older one.
  cudaFuncAttributes facts{};
  if (cudaFuncGetAttributes(&facts, kernel) != cudaSuccess) return;  // the face's launch check reports it
  if (shared + facts.sharedSizeBytes > 48 << 10) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  }
  cudaLaunchAttribute beside{};
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &beside;
  config.numAttrs = facts.ptxVersion >= 90 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args...);
}

template <int kWarps, int kDepth, int kBlocks, typename T, typename Weight>
void launch_decode_as(const DecodeProblem<T>& p, const Weight& weight, size_t shared, cudaStream_t stream) {
  const int64_t tiles = (p.out + kDecodeRows - 1) / kDecodeRows;
  decode_adapter_kernel<T><<<static_cast<unsigned>(p.rank), kDecodeAdapterThreads, 0, stream>>>(p);
  launch_beside(decode_kernel<T, Weight, kWarps, kDepth, kBlocks>, static_cast<unsigned>(tiles), 32 * kWarps, shared,
                stream, p, weight);
}

// weight: (out, in), 16-byte aligned. in: a multiple of 8. 1 to 8 tokens, rank and out at least 1.
template <typename T>
void launch_decode(const DecodeProblem<T>& p, const T* weight, cudaStream_t stream) {
  launch_decode_as<8, 2, 3>(p, DenseWeight<T>{weight}, 0, stream);
}

// packed: (out * in / 2,), 16-byte aligned. in: a multiple of 32.
template <typename T>
void launch_decode_nf4(const DecodeProblem<T>& p, const uint8_t* packed, const Nf4Scales& scales, int64_t blocksize,
                       cudaStream_t stream) {
  const int slots = scale_slot(static_cast<int>(decode_scales(p.in, blocksize))) + 1;
  launch_decode_as<8, 2, 2>(p, PackedWeight<T>{packed, scales, shift_of(blocksize)}, slots * sizeof(float), stream);
}

}  // namespace dora_ext
