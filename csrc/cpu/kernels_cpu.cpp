// Which instruction set's loops run on this machine. ATEN_CPU_CAPABILITY (default, avx2, avx512) restrains them as it
// restrains torch's own.
#include "kernels.h"

#include <ATen/Version.h>

#include <string>

namespace dora_ext::cpu {

#define DORA_EXT_DECLARE(T)              \
  const Kernels<T>& baseline_kernels(T); \
  const Kernels<T>& avx2_kernels(T);     \
  const Kernels<T>& avx512_kernels(T);
DORA_EXT_DECLARE(float)
DORA_EXT_DECLARE(double)
DORA_EXT_DECLARE(BFloat16)
DORA_EXT_DECLARE(Float16)
const Nf4Product<BFloat16>& avx512_bf16_nf4_product();

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         at::get_cpu_capability() != "DEFAULT";
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         at::get_cpu_capability() == "AVX512";
}
#endif

template <typename T>
const Kernels<T>& choose() {
#if defined(__x86_64__)
  if (has_avx512()) return avx512_kernels(T());
  if (has_avx2()) return avx2_kernels(T());
#endif
  return baseline_kernels(T());
}

}  // namespace

#define DORA_EXT_CHOOSE(T)                         \
  template <>                                      \
  const Kernels<T>& kernels<T>() {                 \
    static const Kernels<T>& chosen = choose<T>(); \
    return chosen;                                 \
  }
DORA_EXT_CHOOSE(float)
DORA_EXT_CHOOSE(double)
DORA_EXT_CHOOSE(BFloat16)
DORA_EXT_CHOOSE(Float16)

const Nf4Product<BFloat16>& nf4_product_bfloat16() {
  static constexpr Nf4Product<BFloat16> none{};
#if defined(__x86_64__)
  static const bool here = has_avx512() && __builtin_cpu_supports("avx512bf16");
  if (here) return avx512_bf16_nf4_product();
#endif
  return none;
}

}  // namespace dora_ext::cpu
