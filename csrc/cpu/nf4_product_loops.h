// A few tokens times a weight packed in NF4, with AVX-512. Sixty-four bytes, 128 weights, are one vector, and shifted
// by four bits it is the next vector of codes: no byte is moved, tokens are put in that order once.

constexpr int64_t kStep = kNf4Step;

// Which weight of its lane, in reading order, comes with a shift of 4 p bits: of a byte, the high half comes first.
constexpr int in_lane(int part) {
  return part ^ 1;
}

// Weights as floats, rounded to T: lane i holds the codes of weights 8 i to 8 i + 7. A step's first 64 weights look
// into one codebook times its scale, the others into another.
template <typename T>
struct Nf4Floats {
  using X = float;
  static constexpr int kParts = 8, kLanes = 16;
  FloatVector first, second;

  inline Nf4Floats(FloatVector codebook, float a, float b)
      : first(rounded_to<T>(codebook * a)), second(rounded_to<T>(codebook * b)) {}

  inline __m512 weights(__m512i step, int part) const {
    const __m512i codes = _mm512_and_si512(_mm512_srli_epi32(step, 4 * part), _mm512_set1_epi32(15));
    return _mm512_permutex2var_ps(bit_cast<__m512>(first), _mm512_or_si512(codes, _mm512_maskz_set1_epi32(0xff00, 16)),
                                  bit_cast<__m512>(second));
  }
  static inline __m512 add_product(__m512 sum, __m512 weights, const float* x) {
    return _mm512_fmadd_ps(weights, _mm512_loadu_ps(x), sum);
  }
};

// x (tokens, columns) in the order of the weights: [step][part][token][lane].
template <typename Format>
void arrange_nf4(typename Format::X* to, const typename Format::X* x, int64_t tokens, int64_t columns) {
  for (int64_t step = 0; step < columns; step += kStep)
    for (int part = 0; part < Format::kParts; ++part)
      for (int64_t token = 0; token < tokens; ++token)
        for (int lane = 0; lane < Format::kLanes; ++lane)
          *to++ = x[token * columns + step + lane * Format::kParts + in_lane(part)];
}

// sums[token] += weights `begin` to `end`, of one row, times x.
template <typename Format, int Tokens>
inline void add_nf4_row(__m512* sums, const Nf4Rows& w, int64_t begin, int64_t end, const typename Format::X* x) {
  constexpr int kMost = Tokens == 1 ? 8 : Tokens == 2 ? 4 : Tokens <= 4 ? 2 : 1;  // that hide a sum's latency
  constexpr int kChains = kMost < Format::kParts ? kMost : Format::kParts;
  const FloatVector codebook = load(w.codebook);
  const float* const scales = w.scales - (w.begin >> w.block_shift);
  const uint8_t* const bytes = w.bytes - w.begin / 2;
  __m512 sum[Tokens][kChains] = {};
  for (int64_t at = begin; at < end; at += kStep) {
    const Format format(codebook, scales[at >> w.block_shift], scales[(at + kStep / 2) >> w.block_shift]);
    const __m512i step = _mm512_loadu_si512(bytes + at / 2);
    for (int part = 0; part < Format::kParts; ++part) {
      const auto weights = format.weights(step, part);
      for (int token = 0; token < Tokens; ++token, x += Format::kLanes)
        sum[token][part % kChains] = Format::add_product(sum[token][part % kChains], weights, x);
    }
  }
  for (int token = 0; token < Tokens; ++token)
    for (int chain = 0; chain < kChains; ++chain) sums[token] = _mm512_add_ps(sums[token], sum[token][chain]);
}

template <typename Format, int Tokens = 8>
void multiply_nf4(float* out, int64_t ld, const Nf4Rows& w, int64_t rows, const typename Format::X* x, int64_t tokens) {
  if constexpr (Tokens > 1) {
    if (tokens < Tokens) return multiply_nf4<Format, Tokens - 1>(out, ld, w, rows, x, tokens);
  }
  // As much of x as half of the L1 cache holds serves all rows.
  constexpr int64_t kPiece = 16384 / static_cast<int64_t>(Tokens * sizeof(typename Format::X)) / kStep * kStep;
  __m512 sums[kNf4MostRows][Tokens] = {};
  for (int64_t first = 0; first < w.columns; first += kPiece) {
    const int64_t columns = min(kPiece, w.columns - first);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = w.begin + row * w.columns + first;
      add_nf4_row<Format, Tokens>(sums[row], w, begin, begin + columns, x + first * Tokens);
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int token = 0; token < Tokens; ++token)
      out[token * ld + row] = static_cast<float>(sum_lanes(bit_cast<FloatVector>(sums[row][token])));
}

template <typename T>
constexpr Nf4Product<float> nf4_product() {
  if constexpr (sizeof(T) == 8) {
    return {};
  } else {
    return {arrange_nf4<Nf4Floats<T>>, multiply_nf4<Nf4Floats<T>>};
  }
}
