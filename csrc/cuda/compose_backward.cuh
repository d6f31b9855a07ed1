// compose_backward: one pass over the gradient and what was saved writes G and per-feature sums, a second small launch
// adds the partial sums in their order (the same bits each time) and turns them into gradients.
//
//   features last    a block owns up to 32 x 16 bytes of features and walks a share of the tokens
//   channels first   a warp owns a channel and walks a piece of its positions, over a group of samples
#pragma once

#include <algorithm>

#include "compose_common.cuh"
#include "mma.cuh"

namespace dora_ext {

template <typename T>
struct ComposeBackwardProblem {
  using Acc = accumulate_t<T>;
  const T* grad;          // (tokens, out), or (batch, out, length) channels first
  const T* saved;         // the same; (any, out) with `rows`
  T* scaled;              // G = (gain + gain_offset) * grad, like grad; null: not asked for
  const Acc* gain;        // (out,); null counts as 0
  Acc gain_offset;        //
  FeatureVector bias;     // (out,), taken off saved; data null for none
  const int64_t* rows;    // (tokens,), null: token t goes with saved's row rows[t]; -1: its gradient counts as 0
  int64_t tokens;         // features last
  int64_t batch, length;  // channels first
  int64_t out;
  Acc* partials;  // (splits, 2, out): sums of grad * (saved - bias), sums of grad
};

// Small gains leave too few bits of u in y = g u + bias.
constexpr float kSmallGain = 1.0f / 16;

// How the sums are split.
struct BackwardPlan {
  int64_t splits = 0;
  int64_t blocks = 0;               // features last: side by side, per split. Channels first: all
  int columns = 0;                  // features last: threads side by side along the features, a power of two up to 32
  int64_t share = 0;                // features last: tokens of a split. Channels first: positions of a piece
  int64_t pieces = 1, samples = 1;  // channels first: pieces of a row, samples of a group
};

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

// sum, total (N numbers each) += this thread's N features of one token, or N positions of one channel.
template <typename T, int N, typename Acc>
__device__ __forceinline__ Pack<T, N> backward_step(const Pack<T, N>& grad, const Pack<T, N>& saved, const Acc* gain,
                                                    const Acc* bias, Acc* sum, Acc* total, int stride) {
  Pack<T, N> scaled;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Acc d = widen(grad.v[i]);
    scaled.v[i] = narrow<T>(gain[i * stride] * d);
    sum[i * stride] = fma(d, widen(saved.v[i]) - bias[i * stride], sum[i * stride]);
    total[i * stride] += d;
  }
  return scaled;
}

// N features a thread.
template <typename T, int N>
__global__ void __launch_bounds__(256, 2) compose_backward_rows_kernel(ComposeBackwardProblem<T> p, BackwardPlan plan) {
  using Acc = accumulate_t<T>;
  constexpr int kThreads = 256, kUnroll = sizeof(T) == 8 ? 2 : 4;
  __shared__ Acc scratch[2 * N][kThreads];
  const int x = threadIdx.x % plan.columns, y = threadIdx.x / plan.columns, rows = kThreads / plan.columns;
  const int64_t feature = (blockIdx.x % plan.blocks * plan.columns + x) * N, split = blockIdx.x / plan.blocks;
  const int64_t end = min(p.tokens, (split + 1) * plan.share);

  Acc sums[2 * N] = {};  // grad * (saved - bias), then grad
  if (feature < p.out) {
    Acc gain[N], bias[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      gain[i] = (p.gain != nullptr ? p.gain[feature + i] : Acc(0)) + p.gain_offset;
      bias[i] = p.bias.data != nullptr ? p.bias.template at<Acc>(feature + i) : Acc(0);
    }
    for (int64_t token = split * plan.share + y; token < end; token += kUnroll * rows) {
      Pack<T, N> grad[kUnroll], saved[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t t = token + u * rows;
        const int64_t from = t >= end ? -1 : p.rows == nullptr ? t : p.rows[t];
        if (from >= 0) {
          grad[u] = *reinterpret_cast<const Pack<T, N>*>(p.grad + t * p.out + feature);
          saved[u] = *reinterpret_cast<const Pack<T, N>*>(p.saved + from * p.out + feature);
        } else {
#pragma unroll
          for (int i = 0; i < N; ++i) grad[u].v[i] = saved[u].v[i] = narrow<T>(0.0f);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t t = token + u * rows;
        const Pack<T, N> scaled = backward_step(grad[u], saved[u], gain, bias, sums, sums + N, 1);
        if (p.scaled != nullptr && t < end) store(p.scaled + t * p.out + feature, scaled);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) scratch[i][threadIdx.x] = sums[i];
  __syncthreads();
  for (int e = threadIdx.x; e < 2 * N * plan.columns; e += kThreads) {
    const int i = e / plan.columns, column = e % plan.columns;
    const int64_t f = (blockIdx.x % plan.blocks * plan.columns + column) * N + i % N;
    if (f >= p.out) continue;
    Acc sum = 0;
    for (int row = 0; row < rows; ++row) sum += scratch[i][row * plan.columns + column];
    p.partials[(split * 2 + i / N) * p.out + f] = sum;
  }
}

// N positions a lane and step. Split = (group of samples, piece of the positions).
template <typename T, int N>
__global__ void __launch_bounds__(256, kBeforeAmpere ? 2 : 3)
    compose_backward_channels_kernel(ComposeBackwardProblem<T> p, BackwardPlan plan) {
  using Acc = accumulate_t<T>;
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x % 32;
  const int64_t warp = blockIdx.x * int64_t{8} + threadIdx.x / 32, split = warp / p.out, channel = warp % p.out;
  if (split >= plan.splits) return;
  const int64_t sample0 = split / plan.pieces * plan.samples, begin = split % plan.pieces * plan.share;
  const int64_t sample_end = min(p.batch, sample0 + plan.samples), end = min(p.length, begin + plan.share);
  const Acc gain = (p.gain != nullptr ? p.gain[channel] : Acc(0)) + p.gain_offset;
  const Acc bias = p.bias.data != nullptr ? p.bias.template at<Acc>(channel) : Acc(0);

  Acc sum = 0, total = 0;
  for (int64_t sample = sample0; sample < sample_end; ++sample) {
    const int64_t row = (sample * p.out + channel) * p.length;
    for (int64_t position = begin + lane * N; position < end; position += 32 * N * kUnroll) {
      Pack<T, N> grad[kUnroll], saved[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = position + u * 32 * N;
        if (at < end) {
          grad[u] = *reinterpret_cast<const Pack<T, N>*>(p.grad + row + at);
          saved[u] = *reinterpret_cast<const Pack<T, N>*>(p.saved + row + at);
        } else {
#pragma unroll
          for (int i = 0; i < N; ++i) grad[u].v[i] = saved[u].v[i] = narrow<T>(0.0f);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = position + u * 32 * N;
        const Pack<T, N> scaled = backward_step(grad[u], saved[u], &gain, &bias, &sum, &total, 0);
        if (p.scaled != nullptr && at < end) store(p.scaled + row + at, scaled);
      }
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(~0u, sum, offset);
    total += __shfl_xor_sync(~0u, total, offset);
  }
  if (lane == 0) {
    p.partials[split * 2 * p.out + channel] = sum;
    p.partials[(split * 2 + 1) * p.out + channel] = total;
  }
}

// partials (splits, 2, out) -> grad_magnitude (out,) = factor * sum / n, or over g n where saved was the output, and
// grad_bias (out,), which may be null.
template <typename Acc>
struct ComposeBackwardFinish {
  const Acc* partials;
  int64_t splits, out;
  const Acc *norm, *gain;
  bool saved_is_output;
  Acc factor;
  FeatureResult grad_magnitude;
  Acc* grad_bias;

  static constexpr int kFeatures = 32;  // of a block of 256 threads, 8 shares of the splits

  __device__ __forceinline__ void run(int64_t block) const {
    __shared__ Acc scratch[2][8][kFeatures];
    const int x = threadIdx.x % kFeatures, y = threadIdx.x / kFeatures;
    const int64_t feature = block * kFeatures + x;
    Acc sum = 0, total = 0;
    if (feature < out) {
#pragma unroll 4
      for (int64_t split = y; split < splits; split += 8) {
        sum += partials[split * 2 * out + feature];
        total += partials[(split * 2 + 1) * out + feature];
      }
    }
    scratch[0][y][x] = sum;
    scratch[1][y][x] = total;
    __syncthreads();
    if (y != 0 || feature >= out) return;
    for (int i = 1; i < 8; ++i) {
      sum += scratch[0][i][x];
      total += scratch[1][i][x];
    }
    const Acc n = norm[feature], g = saved_is_output ? gain[feature] : Acc(1);
    const bool lost = !(n > 0) || (saved_is_output && !(abs(g) >= Acc(kSmallGain)));
    grad_magnitude.store(feature, lost ? Acc(0) : factor * sum / (g * n));
    if (grad_bias != nullptr) grad_bias[feature] = total;
  }
};

template <typename Acc>
__global__ void __launch_bounds__(256) compose_backward_finish_kernel(ComposeBackwardFinish<Acc> finish) {
  finish.run(blockIdx.x);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

// About 8 blocks for every multiprocessor, which runs 2 or 3 at once, but no split under 64 tokens or 1024 positions,
// and few enough splits that adding them up stays cheap.
template <typename T>
BackwardPlan plan_compose_backward(int64_t tokens, int64_t batch, int64_t length, int64_t out, bool channels_first,
                                   bool aligned, int multiprocessors) {
  constexpr int64_t kMostSplits = 512;
  const int64_t per_access = aligned ? 16 / sizeof(T) : 1, wanted = int64_t{multiprocessors} * 8;
  BackwardPlan plan;
  if (channels_first) {
    if (batch * length * out == 0) return plan;
    plan.samples = ceil_div(batch, kMostSplits);
    const int64_t groups = ceil_div(batch, plan.samples);
    const int64_t most = std::min(ceil_div<int64_t>(length, 1024), std::max<int64_t>(1, kMostSplits / groups));
    plan.pieces = std::clamp<int64_t>(ceil_div(wanted * 8, groups * out), 1, most);
    plan.share = ceil_div<int64_t>(ceil_div(length, plan.pieces), 256) * 256;
    plan.pieces = ceil_div(length, plan.share);
    plan.splits = groups * plan.pieces;
    plan.blocks = ceil_div<int64_t>(plan.splits * out, 8);
  } else {
    if (tokens * out == 0) return plan;
    plan.columns = 1;
    while (plan.columns < 32 && plan.columns * per_access < out) plan.columns *= 2;
    plan.blocks = ceil_div(out, plan.columns * per_access);
    const int64_t most = std::min(ceil_div<int64_t>(tokens, 64), kMostSplits);
    plan.splits = std::clamp<int64_t>(wanted / plan.blocks, 1, most);
    plan.share = ceil_div(tokens, plan.splits);
    plan.splits = ceil_div(tokens, plan.share);
  }
  return plan;
}

// Whether all accesses may be of 16 bytes.
template <typename T>
bool compose_backward_aligned(const ComposeBackwardProblem<T>& p, bool channels_first) {
  constexpr int64_t kPerAccess = 16 / sizeof(T);
  return (channels_first ? p.length : p.out) % kPerAccess == 0 && on_16_bytes(p.grad) && on_16_bytes(p.saved) &&
         on_16_bytes(p.scaled);
}

template <typename T>
void launch_compose_backward_features_last(const ComposeBackwardProblem<T>& p, const BackwardPlan& plan, bool aligned,
                                           cudaStream_t stream) {
  if (plan.splits == 0) return;
  const auto kernel = aligned ? compose_backward_rows_kernel<T, 16 / sizeof(T)> : compose_backward_rows_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(plan.blocks * plan.splits), 256, 0, stream>>>(p, plan);
}

template <typename T>
void launch_compose_backward_channels_first(const ComposeBackwardProblem<T>& p, const BackwardPlan& plan, bool aligned,
                                            cudaStream_t stream) {
  if (plan.splits == 0) return;
  const auto kernel =
      aligned ? compose_backward_channels_kernel<T, 16 / sizeof(T)> : compose_backward_channels_kernel<T, 1>;
  kernel<<<static_cast<unsigned>(plan.blocks), 256, 0, stream>>>(p, plan);
}

// norm, gain, grad_magnitude, grad_bias (out,); grad_bias may be null
template <typename Acc>
void launch_compose_backward_finish(const Acc* partials, int64_t splits, int64_t out, const Acc* norm, const Acc* gain,
                                    bool saved_is_output, Acc factor, FeatureResult grad_magnitude, Acc* grad_bias,
                                    cudaStream_t stream) {
  if (out == 0) return;
  const ComposeBackwardFinish<Acc> finish{partials, splits,         out,      norm, gain, saved_is_output,
                                          factor,   grad_magnitude, grad_bias};
  const auto blocks = ceil_div<int64_t>(out, ComposeBackwardFinish<Acc>::kFeatures);
  compose_backward_finish_kernel<Acc><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(finish);
}

}  // namespace dora_ext
