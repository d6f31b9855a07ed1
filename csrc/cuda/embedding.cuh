// The embedding's own kernels. Its forward is compose over gathered rows: embedding_gather_kernel fetches A's columns
// as h (tokens, rank) and checks the ids, then compose reads W by row number (compose.cuh). Its backward likewise
// begins with compose_backward over gathered rows; embedding_scatter_kernel adds the tokens' shares of A's gradient per
// id.
#pragma once

#include "compose_common.cuh"

namespace dora_ext {

// ---------------------------------------------------------------------------------------------------------------------
// Kernels

// ids (tokens,) int32 or int64 -> rows (tokens,), -1 where out of [0, vocab); h (tokens, rank) = A[:, ids]^T, zeros
// there. lora_A (rank, vocab) by its strides: a contiguous copy would be as large as the vocabulary.
template <typename T, typename Id>
__global__ void embedding_gather_kernel(const Id* ids, int64_t tokens, int64_t vocab, FeatureVector lora_A,
                                        int64_t rank_stride, int64_t vocab_stride, int rank, int64_t* rows, T* h) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, token = i / rank;
  if (token >= tokens) return;
  const int64_t k = i % rank, id = ids[token];
  const bool valid = id >= 0 && id < vocab;
  if (k == 0) rows[token] = valid ? id : -1;
  using Acc = accumulate_t<T>;
  h[i] = narrow<T>(valid ? lora_A.template at<Acc>(k * rank_stride + id * vocab_stride) : Acc(0));
}

// grad_A (rank, vocab), zero before: column id = sum of values[t] (tokens, rank) over the tokens t with that id.
// sorted (tokens,) are the row numbers in ascending order, order (tokens,) the tokens that they came from. The block
// of a run's first position owns the run, 128 threads = (tokens in parallel, columns); the others return at once.
template <typename Acc, typename A>
__global__ void __launch_bounds__(128)
    embedding_scatter_kernel(const int64_t* sorted, const int64_t* order, const Acc* values, int64_t tokens, int rank,
                             int columns, int64_t padding_idx, bool scale_by_frequency, int64_t vocab, A* grad_A) {
  __shared__ Acc scratch[128];
  __shared__ int64_t counts[128];
  const int64_t head = blockIdx.x, id = sorted[head];
  if (id < 0 || id == padding_idx || (head > 0 && sorted[head - 1] == id)) return;
  const int x = threadIdx.x % columns, y = threadIdx.x / columns, parallel = 128 / columns;
  for (int k = x; k - x < rank; k += columns) {
    Acc sum = 0;
    int64_t count = 0;
    for (int64_t i = head + y; i < tokens && sorted[i] == id; i += parallel) {
      if (k < rank) sum += values[order[i] * rank + k];
      ++count;
    }
    scratch[threadIdx.x] = sum;
    counts[threadIdx.x] = count;
    __syncthreads();
    if (y == 0 && k < rank) {
      for (int other = 1; other < parallel; ++other) {
        sum += scratch[other * columns + x];
        count += counts[other * columns + x];
      }
      grad_A[k * vocab + id] = narrow<A>(scale_by_frequency ? sum / static_cast<Acc>(count) : sum);
    }
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers

template <typename T, typename Id>
void launch_embedding_gather(const Id* ids, int64_t tokens, int64_t vocab, FeatureVector lora_A, int64_t rank_stride,
                             int64_t vocab_stride, int rank, int64_t* rows, T* h, cudaStream_t stream) {
  if (tokens == 0) return;
  embedding_gather_kernel<T, Id><<<static_cast<unsigned>(ceil_div<int64_t>(tokens * rank, 256)), 256, 0, stream>>>(
      ids, tokens, vocab, lora_A, rank_stride, vocab_stride, rank, rows, h);
}

template <typename Acc, typename A>
void launch_embedding_scatter(const int64_t* sorted, const int64_t* order, const Acc* values, int64_t tokens, int rank,
                              int64_t padding_idx, bool scale_by_frequency, int64_t vocab, A* grad_A,
                              cudaStream_t stream) {
  if (tokens == 0) return;
  int columns = 1;
  while (columns < rank && columns < 128) columns *= 2;
  embedding_scatter_kernel<Acc, A><<<static_cast<unsigned>(tokens), 128, 0, stream>>>(
      sorted, order, values, tokens, rank, columns, padding_idx, scale_by_frequency, vocab, grad_A);
}

}  // namespace dora_ext
