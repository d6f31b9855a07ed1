// The loops for any CPU that the compiler targets (SSE2 on x86-64, NEON on ARM).
#include <cstdint>

#include "kernels.h"

#define INSTRUCTION_SET baseline
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#define TILE_VECTORS 2
#include "loops.h"
