// bitsandbytes' NF4: the sixteen values, the thresholds between them, and the order of the two codes in a byte. The
// tables are for host code; nf4.cuh makes copies of them on the device.
//
// Of two neighbouring weights the first has its code in the high nibble, the second in the low one. A block of
// `blocksize` consecutive weights (row-major, over the ends of rows) shares one scale, its largest absolute value.
#pragma once

#include <cstdint>

namespace dora_ext {

struct Nf4Codebook {
  float value[16];
  // A scaled weight v has the code that counts the thresholds below it. They are the midpoints of the values above,
  // rounded to fp32.
  float threshold[15];
};

constexpr Nf4Codebook kNf4 = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {-0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
     -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f, 0.2035212516784668f,
     0.2920137718319893f, 0.3893125355243683f, 0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f}};

constexpr uint8_t kNf4Zero = 7;  // the code of 0, which also fills the last byte of an odd number of weights

// What goes into one dequantisation beside the packed weights. `absmax` is fp32 (blocks,); nested: uint8 (blocks,),
// and the scale of block b is code[absmax[b]] * nested_absmax[b >> nested_shift] + *offset, rounded after each step.
struct Nf4Scales {
  const void* absmax;
  const float* nested_absmax;  // null: not nested
  const float* code;           // (256,)
  const float* offset;         // (1,), null: 0
  int nested_shift;
  int64_t first_block = 0;  // that packed weights begin with, where they are part of a tensor
};

// log2 of a power of two.
constexpr int shift_of(int64_t power) {
  int shift = 0;
  while (power >>= 1) ++shift;
  return shift;
}

}  // namespace dora_ext
