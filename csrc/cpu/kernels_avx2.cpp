// The loops for AVX2 with FMA and F16C: 16 registers of 32 bytes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#pragma GCC target("avx2,fma,f16c")
#define INSTRUCTION_SET avx2
#define VECTOR_BYTES 32
#define TILE_ROWS 4
#define TILE_VECTORS 2
#include "loops.h"
#endif
