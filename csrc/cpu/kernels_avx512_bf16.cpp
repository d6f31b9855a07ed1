// NF4 products with AVX-512's instructions for bfloat16, which multiply and add two pairs a lane.
#include "kernels.h"

#if defined(__x86_64__)
// GCC 12 says that of its own intrinsics (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <cstdint>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#define VECTOR_BYTES 64

namespace dora_ext::cpu {
namespace avx512_bf16 {

#include "vectors.h"
//
#include "nf4_loops.h"

// As Nf4Floats: lane i, of 16 bits, holds the codes of weights 4 i to 4 i + 3, and neighbouring lanes' products are
// added up.
struct Nf4Pairs {
  using X = BFloat16;
  static constexpr int kParts = 4, kLanes = 32;
  __m512i both;

  inline Nf4Pairs(FloatVector codebook, float a, float b)
      : both(_mm512_inserti64x4(_mm512_castsi256_si512(rounded(codebook * a)), rounded(codebook * b), 1)) {}

  static inline __m256i rounded(FloatVector v) { return bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(v))); }

  inline __m512bh weights(__m512i step, int part) const {
    const __m512i codes = _mm512_and_si512(_mm512_srli_epi16(step, 4 * part), _mm512_set1_epi16(15));
    const __m512i second = _mm512_maskz_set1_epi16(0xffff0000, 16);
    return bit_cast<__m512bh>(_mm512_permutexvar_epi16(_mm512_or_si512(codes, second), both));
  }
  static inline __m512 add_product(__m512 sum, __m512bh weights, const BFloat16* x) {
    return _mm512_dpbf16_ps(sum, weights, bit_cast<__m512bh>(_mm512_loadu_si512(x)));
  }
};

}  // namespace avx512_bf16

const Nf4Product<BFloat16>& avx512_bf16_nf4_product() {
  using avx512_bf16::Nf4Pairs;
  static constexpr Nf4Product<BFloat16> product{avx512_bf16::arrange_nf4<Nf4Pairs>,
                                                avx512_bf16::multiply_nf4<Nf4Pairs>};
  return product;
}

}  // namespace dora_ext::cpu
#endif
