// What the faces of products share, hopper_product and hopper_forward: how matrices are described, and the zeros in
// memory that a product counts with.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <map>
#include <mutex>
#include <utility>

#include "launch.h"
#include "tensor_map.cuh"

namespace dora_ext {

inline bool on_hopper() {
  return capability() == 90 && map_encoder() != nullptr;
}

inline HalfMatrix product_matrix(const at::Tensor& t) {
  return {t.const_data_ptr(), t.size(1), t.size(0), t.stride(0)};
}

// What a product on the current stream counts with. A stream's products follow one another and share theirs; its id is
// never used again, as its address may be.
struct ProductCounters {
  unsigned* tiles;     // ProductProblem::counters. Null under capture: replays of a graph run on other streams, beside
                       // this one's products
  unsigned* first;     // FirstCounters
  bool fresh = false;  // zeroed by a launch just before
  at::Tensor keep;
};

// A captured product that makes something first gets counters of its own, never to be given again, since replays of
// its graph may run beside anything but one another.
inline ProductCounters product_counters(const at::Tensor& like, bool any_first) {
  constexpr int64_t kTiles = 2, kEach = 2 + 2 + 256 + 4, kCaptured = 1 << 12;
  struct Kept {
    at::Tensor captured;  // four million bytes
    int64_t given = 0;
    std::map<unsigned long long, at::Tensor> streams;
  };
  static std::mutex mutex;
  static auto* const kept = new std::map<int, Kept>;  // the driver may be gone at exit
  const bool captures = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  if (captures && !any_first) return {};
  const auto zeros = [&](int64_t count) { return at::zeros({count * kEach}, like.options().dtype(at::kInt)); };
  const auto numbers = [](const at::Tensor& t) { return reinterpret_cast<unsigned*>(t.mutable_data_ptr()); };
  const std::lock_guard<std::mutex> lock(mutex);
  Kept& here = (*kept)[like.get_device()];
  if (captures) {
    at::Tensor own;
    if (here.captured.defined() && here.given < kCaptured) {
      own = here.captured.narrow(0, kEach * here.given++, kEach);
    } else {
      own = zeros(1);  // one launch more in each replay
    }
    return {nullptr, numbers(own) + kTiles, here.given == kCaptured, own};
  }
  if (any_first && !here.captured.defined()) {
    here.captured = zeros(kCaptured);
    C10_CUDA_CHECK(cudaStreamSynchronize(current_stream()));  // a replay on another stream may be the next to use it
  }
  unsigned long long stream = 0;
  C10_CUDA_CHECK(cudaStreamGetId(current_stream(), &stream));
  at::Tensor& counters = here.streams[stream];
  const bool fresh = !counters.defined();
  if (fresh) counters = zeros(1);
  return {numbers(counters), numbers(counters) + kTiles, fresh, counters};
}

}  // namespace dora_ext
