// Weights packed in NF4, unpacked by vectors. Included by loops.h inside the namespace of an instruction set.

// The codes of as many weights as a vector of floats has lanes; of a byte, the high half comes first.
#if VECTOR_BYTES == 64
inline WordVector codes_of(const uint8_t* bytes) {
  const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), low = _mm_set1_epi8(15);
  const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(pairs, 4), low), _mm_and_si128(pairs, low));
  return bit_cast<WordVector>(_mm512_cvtepu8_epi32(codes));
}
inline FloatVector look_up(const FloatVector (&table)[1], WordVector codes) {
  return bit_cast<FloatVector>(_mm512_permutexvar_ps(bit_cast<__m512i>(codes), bit_cast<__m512>(table[0])));
}
#elif VECTOR_BYTES == 32
inline WordVector codes_of(const uint8_t* bytes) {
  int word;
  __builtin_memcpy(&word, bytes, sizeof(word));
  const __m128i pairs = _mm_cvtsi32_si128(word), low = _mm_set1_epi8(15);
  const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(pairs, 4), low), _mm_and_si128(pairs, low));
  return bit_cast<WordVector>(_mm256_cvtepu8_epi32(codes));
}
inline FloatVector look_up(const FloatVector (&table)[2], WordVector codes) {
  const __m256i index = bit_cast<__m256i>(codes);
  const __m256 lower = _mm256_permutevar8x32_ps(bit_cast<__m256>(table[0]), index);
  const __m256 upper = _mm256_permutevar8x32_ps(bit_cast<__m256>(table[1]), index);
  return bit_cast<FloatVector>(_mm256_blendv_ps(lower, upper, bit_cast<__m256>(codes << 28)));  // by bit 3
}
#else
inline WordVector codes_of(const uint8_t* bytes) {
  WordVector codes;
  for (int i = 0; i < kLanes<float> / 2; ++i) {
    codes[2 * i] = bytes[i] >> 4;
    codes[2 * i + 1] = bytes[i] & 15;
  }
  return codes;
}
inline FloatVector look_up(const FloatVector (&table)[16 / kLanes<float>], WordVector codes) {
  FloatVector v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = table[codes[i] / kLanes<float>][codes[i] % kLanes<float>];
  return v;
}
#endif

template <typename T>
inline FloatVector rounded_to(FloatVector v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    return widen(narrow(v, T()), T());
  }
}

// Stores what is rounded already.
template <typename Out>
inline void store_rounded(Out* out, FloatVector v) {
  store(out, v);
}
inline void store_rounded(BFloat16* out, FloatVector v) {
  const HalfwordVector h = __builtin_convertvector(bit_cast<WordVector>(v) >> 16, HalfwordVector);
  __builtin_memcpy(out, &h, sizeof(h));
}

// An even number of weights in each block. There are only 16 different ones: they are scaled and rounded once.
template <typename T, typename Out>
void unpack_nf4(Out* out, const uint8_t* bytes, int64_t blocks, int64_t count, const float* codebook,
                const float* scales) {
  constexpr int64_t kStep = kLanes<float>;
  for (int64_t block = 0; block < blocks; ++block) {
    FloatVector weight[16 / kStep];
    for (int i = 0; i < 16 / kStep; ++i) weight[i] = rounded_to<T>(load(codebook + i * kStep) * scales[block]);
    int64_t left = count;
    for (; left >= kStep; left -= kStep, bytes += kStep / 2, out += kStep) {
      store_rounded(out, look_up(weight, codes_of(bytes)));
    }
    if (left == 0) continue;
    uint8_t last[kStep / 2] = {};
    for (int64_t i = 0; i < left / 2; ++i) last[i] = bytes[i];
    store_first(out, look_up(weight, codes_of(last)), left);
    bytes += left / 2;
    out += left;
  }
}

// Doubles are never unpacked.
template <typename T, typename Out>
constexpr auto unpack_nf4_or_null() {
  if constexpr (sizeof(T) == 8) {
    return nullptr;
  } else {
    return unpack_nf4<T, Out>;
  }
}

#if VECTOR_BYTES == 64
#include "nf4_product_loops.h"
#else
template <typename T>
constexpr Nf4Product<float> nf4_product() {
  return {};
}
#endif
