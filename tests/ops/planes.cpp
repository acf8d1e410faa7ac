// Both ways from bit planes to weights, one panel: what a processor chooses for good.
#define FDDA_ISA avx512vnni
#include "../../csrc/cpu/planes_avx512.h"

using namespace fdda;
using namespace fdda::FDDA_ISA;

extern "C" int gfni() { return has_gfni(); }

extern "C" void unpack(int bit_matrices, const uint8_t* planes, int bits, int64_t depth,
                       const int8_t* offset, int zero_point, int8_t* panel, int32_t* start) {
  const Planes p{planes, bits, depth};
  const __m512i offsets = _mm512_loadu_si512(offset);
  (bit_matrices ? unpack_bit_matrices : unpack_masked_adds)(p, offsets, zero_point, panel, start);
}
