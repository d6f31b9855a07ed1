// Tiles of W + s B A for fp16 and bf16 and ranks up to 64: bound by reading W, so W streams through shared memory once,
// the block's rows of lora_B stay in registers, and tiles of lora_A come along with W's.
//
//                 in ->        A tile  (16 KT, BN)          BM = 64 WM features, every warp 64 of them
//                                                           BN = 16 NT WN columns, every warp 16 NT of them
//   out   B rows (BM, 16 KT)   W tile  (BM, BN)             kStages tiles of W and A in flight or in use
//    |    in registers (*)
//
// (*) or, where they are many, in shared memory.
// A is read again by every owner of features, from L2: BM is 64 to 128 so that this stays well below W's own bytes.
//
//   Source   where W comes from: DenseSource here, Nf4Source in low_rank_nf4.cuh
//   Sink     what becomes of the sum: SquareSink in norm_low_rank.cuh, StoreSink in scaled_weight.cuh
#pragma once

#include "norm_common.cuh"

namespace dora_ext {

template <int KT, int WM_, int WN_, int NT_, typename Source>
struct LowRankShape {
  static constexpr int WM = WM_, WN = WN_, NT = NT_;
  static constexpr int kThreads = 32 * WM * WN;
  static constexpr int kFeatures = 64 * WM;
  static constexpr int kColumns = 16 * NT * WN;
  static constexpr int kSteps = KT;
  static constexpr int kRank = 16 * KT;
  static constexpr int kStages = 3;
  // 16 bytes of padding a row keep ldmatrix free of bank conflicts.
  static constexpr int kPitchA = kColumns + 8;
  static constexpr int kPitchB = kRank + 8;
  // Rank 64 has no registers to spare: not for the addresses of many copies, nor for B next to twice as much of A.
  static constexpr int kUnroll = KT == 4 ? 2 : 4;
  static constexpr bool kKeepB = KT < 4 || NT == 1;
  static constexpr int kBytesA = 2 * kRank * kPitchA;
  static constexpr int kStage = kBytesA + Source::tile_bytes(kFeatures, kColumns);
  static constexpr int kBytesB = 2 * kFeatures * kPitchB;
  static constexpr int kSharedBytes =
      kStages * kStage + Source::own_bytes(kFeatures, kColumns) + (kKeepB ? 0 : kBytesB);
  static_assert(!kKeepB || kBytesB <= kStage, "lora_B passes through the last stage");
  static_assert(WN * kFeatures * 4 <= kSharedBytes, "so do the sums of a norm");
};

// W as numbers. Rows of memory are 16-byte aligned; (out, in), or (in, out) when Transposed.
template <typename T, bool Transposed>
struct DenseSource {
  static constexpr int pitch(int features, int columns) { return (Transposed ? features : columns) + 8; }
  static constexpr int tile_bytes(int features, int columns) {
    return 2 * (Transposed ? columns : features) * pitch(features, columns);
  }
  static constexpr int own_bytes(int, int) { return 0; }

  const NormProblem<T>& p;

  // Queues the copy of a tile, zeros outside of W.
  template <typename Tile>
  __device__ __forceinline__ void load(void* stage, int64_t feature0, int64_t column0) const {
    constexpr int kPitch = pitch(Tile::kFeatures, Tile::kColumns);
    constexpr int kWidth = (Transposed ? Tile::kFeatures : Tile::kColumns) / 8;
    constexpr int kAll = Tile::kFeatures * Tile::kColumns / 8;
    static_assert(kAll % Tile::kThreads == 0, "every thread has the same number of copies");
    T* tile = static_cast<T*>(stage);
    const int64_t row0 = Transposed ? column0 : feature0, offset0 = Transposed ? feature0 : column0;
    const int64_t rows = Transposed ? p.in : p.out, memory_pitch = Transposed ? p.out : p.in;
#pragma unroll Tile::kUnroll
    for (int i = 0; i < kAll / Tile::kThreads; ++i) {
      const int c = threadIdx.x + i * Tile::kThreads;
      const int row = c / kWidth, offset = c % kWidth * 8;
      stage8<true>(tile + row * kPitch + offset, p.weight, p.weight + (row0 + row) * memory_pitch, row0 + row < rows,
                   offset0 + offset, memory_pitch);
    }
  }

  // Before the first tile, and between the barrier of tile i and its use.
  template <typename Tile>
  __device__ __forceinline__ void start(void*, int64_t, int64_t, int) {}
  template <typename Tile>
  __device__ __forceinline__ void advance(int) {}

  // W's 16 x 16 corner at (feature, column) of the tile, in the layout of load_weight_fragment.
  template <typename Tile>
  __device__ __forceinline__ void fragment(uint32_t (&w)[4], const void* stage, int, int feature, int column) const {
    load_weight_fragment<Transposed>(w, static_cast<const T*>(stage), pitch(Tile::kFeatures, Tile::kColumns), feature,
                                     column);
  }
};

// Queues the copies of a tile of A, zeros outside of it.
template <typename Tile, typename T>
__device__ __forceinline__ void load_low_rank_A(const NormProblem<T>& p, T* tile, int64_t column0) {
  constexpr int kWidth = Tile::kColumns / 8, kAll = Tile::kRank * kWidth;
#pragma unroll
  for (int i = 0; i < (kAll + Tile::kThreads - 1) / Tile::kThreads; ++i) {
    const int c = threadIdx.x + i * Tile::kThreads;
    if (kAll % Tile::kThreads != 0 && c >= kAll) break;
    const int k = c / kWidth, column = c % kWidth * 8;
    stage8<true>(tile + k * Tile::kPitchA + column, p.lora_A, p.lora_A + k * p.pitch_A, k < p.rank, column0 + column,
                 p.pitch_A);
  }
}

// The block's features and its share of `in`. All copies have arrived when it returns.
template <typename Tile, typename T, typename Source, typename Sink>
__device__ __forceinline__ void walk_low_rank(const NormProblem<T>& p, int64_t tiles_per_split, unsigned char* shared,
                                              Source& source, Sink& sink) {
  const int lane = threadIdx.x % 32, warp_m = threadIdx.x / 32 % Tile::WM, warp_n = threadIdx.x / 32 / Tile::WM;
  const int64_t feature0 = static_cast<int64_t>(blockIdx.x) * Tile::kFeatures;
  const int64_t column0 = blockIdx.y * tiles_per_split * Tile::kColumns;
  const int64_t all_tiles = (p.in - column0 + Tile::kColumns - 1) / Tile::kColumns;
  const int tiles = static_cast<int>(all_tiles < tiles_per_split ? all_tiles : tiles_per_split);
  const auto load = [&](int stage, int tile) {
    unsigned char* to = shared + stage * Tile::kStage;
    const int64_t column = column0 + static_cast<int64_t>(tile) * Tile::kColumns;
    load_low_rank_A<Tile>(p, reinterpret_cast<T*>(to), column);
    source.template load<Tile>(to + Tile::kBytesA, feature0, column);
  };

  // lora_B's rows arrive with the first tile. To become registers they pass through the one stage that isn't filled
  // yet.
  const int place_B = Tile::kKeepB ? (Tile::kStages - 1) * Tile::kStage : Tile::kSharedBytes - Tile::kBytesB;
  T* b_rows = reinterpret_cast<T*>(shared + place_B);
  load_lora_B<true>(p, b_rows, Tile::kPitchB, feature0, Tile::kFeatures, 0, Tile::kRank);
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    if (s < tiles) load(s, s);
    copy_commit();
  }
  source.template start<Tile>(shared + Tile::kStages * Tile::kStage, feature0, column0, tiles);

  copy_wait<Tile::kStages - 2>();
  __syncthreads();
  uint32_t b_fragments[Tile::kKeepB ? 4 : 1][Tile::kSteps][4];
  const auto load_b_fragments = [&](int m) {
#pragma unroll
    for (int k = 0; k < Tile::kSteps; ++k) {
      load_matrix_x4<false>(b_fragments[Tile::kKeepB ? m : 0][k],
                            b_rows + (warp_m * 64 + m * 16 + lane % 16) * Tile::kPitchB + k * 16 + lane / 16 * 8);
    }
  };
  if constexpr (Tile::kKeepB) {
#pragma unroll
    for (int m = 0; m < 4; ++m) load_b_fragments(m);
  }

  int stage = 0;
  for (int tile_index = 0; tile_index < tiles; ++tile_index) {
    copy_wait<Tile::kStages - 2>();
    // All see this tile; and all have left the one before (at first: lora_B), whose stage is filled next.
    __syncthreads();
    if (tile_index + Tile::kStages - 1 < tiles) {
      load(stage == 0 ? Tile::kStages - 1 : stage - 1, tile_index + Tile::kStages - 1);
    }
    copy_commit();
    source.template advance<Tile>(tile_index);

    const unsigned char* tile = shared + stage * Tile::kStage;
    uint32_t a_fragments[Tile::kKeepB ? Tile::NT : 1][Tile::kSteps][4];
    const auto load_a_fragments = [&](int n) {
#pragma unroll
      for (int k = 0; k < Tile::kSteps; ++k) {
        load_matrix_x4<true>(a_fragments[Tile::kKeepB ? n : 0][k], reinterpret_cast<const T*>(tile) +
                                                                       (k * 16 + lane % 16) * Tile::kPitchA +
                                                                       (warp_n * Tile::NT + n) * 16 + lane / 16 * 8);
      }
    };
    if constexpr (Tile::kKeepB) {
#pragma unroll
      for (int n = 0; n < Tile::NT; ++n) load_a_fragments(n);
    }
    // All columns of 16 features after each other, or all features of 16 columns where B is fetched again and again.
#pragma unroll
    for (int i = 0; i < 4 * Tile::NT; ++i) {
      const int m = Tile::kKeepB ? i / Tile::NT : i % 4, n = Tile::kKeepB ? i % Tile::NT : i / 4;
      const int feature = warp_m * 64 + m * 16, column = (warp_n * Tile::NT + n) * 16;
      if constexpr (!Tile::kKeepB) {
        if (m == 0) load_a_fragments(n);
        load_b_fragments(m);
      }
      float left[4] = {}, right[4] = {};
#pragma unroll
      for (int k = 0; k < Tile::kSteps; ++k) {
        const auto& a = a_fragments[Tile::kKeepB ? n : 0][k];
        const auto& b = b_fragments[Tile::kKeepB ? m : 0][k];
        mma_m16n8k16<T>(left, b, {a[0], a[1]});
        mma_m16n8k16<T>(right, b, {a[2], a[3]});
      }
      uint32_t w[4];
      source.template fragment<Tile>(w, tile + Tile::kBytesA, tile_index, feature, column);
      sink.take(m, column0 + static_cast<int64_t>(tile_index) * Tile::kColumns + column, w, left, right, p.scaling);
    }
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
  copy_wait<0>();
}

// How a kernel over such tiles is launched: blocks of (owned features, splits of `in`).
template <typename Kernel>
struct LowRankPlan {
  Kernel* kernel = nullptr;  // null: no tile fits
  int threads = 0;
  int shared_bytes = 0;
  int64_t owned_tiles = 0;
  Splits splits{};

  template <typename... Args>
  void launch(cudaStream_t stream, const Args&... args) const {
    if (splits.count == 0) return;  // in = 0
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    const dim3 grid(static_cast<unsigned>(owned_tiles), static_cast<unsigned>(splits.count));
    kernel<<<grid, threads, shared_bytes, stream>>>(args..., splits.tiles);
  }
};

// Makes `kernel`, whose tiles these are, the plan, if they hold the rank and the device holds them. `resident`: blocks
// on a multiprocessor, by their registers.
template <typename Tile, typename Kernel>
bool plan_low_rank_tile(LowRankPlan<Kernel>& plan, Kernel* kernel, int rank, int64_t out, int64_t in, int64_t resident,
                        int multiprocessors, int64_t shared_limit) {
  if (rank > Tile::kRank || Tile::kSharedBytes > shared_limit) return false;
  const int64_t owned_tiles = (out + Tile::kFeatures - 1) / Tile::kFeatures;
  resident = std::min(resident, shared_limit / Tile::kSharedBytes);
  plan = {kernel, Tile::kThreads, Tile::kSharedBytes, owned_tiles,
          split_walk(owned_tiles, (in + Tile::kColumns - 1) / Tile::kColumns, multiprocessors * resident)};
  return true;
}

}  // namespace dora_ext
