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

namespace {

template <typename T>
const Kernels<T>& choose() {
#if defined(__x86_64__)
  const std::string allowed = at::get_cpu_capability();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && allowed == "AVX512") return avx512_kernels(T());
  if (avx2 && allowed != "DEFAULT") return avx2_kernels(T());
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

}  // namespace dora_ext::cpu
