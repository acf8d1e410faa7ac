// Packed convolution with vpdpbusd on 256-bit registers. Compiled twice, for the VEX and for the
// EVEX encoding: processors have one of them or both.

#include "packed_avx2.h"
#include "winograd_avx2.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct Vnni : U8S8Operands {
  static constexpr bool kWidens = false;

  static Vnni of_ranges(int64_t, int64_t) { return {}; }

  static bool exact(int64_t, int64_t) { return true; }

  static __m256i add(__m256i sum, __m256i x, __m256i w) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, x, w);
#else
    return _mm256_dpbusd_epi32(sum, x, w);
#endif
  }

  static void gemm(const Tile<Vnni>& t) { gemm_panels(Vnni(), t); }
};

}  // namespace

const char* packed_conv2d(const PackedConv& conv) {
  if (conv.groups == conv.channels && conv.groups == conv.out_channels) {
    return avx2::kernels.packed_conv2d(conv);  // depthwise
  }
  const int64_t weight = largest_weight(conv);
  if (Winograd<Vnni, Tiles2x2>::applies(conv, weight, 1)) {  // else the other does not, either
    const int64_t code = largest_code(conv);
    if (Winograd<Vnni, Tiles3x3>::run(conv, weight, code)) return "winograd_f3";
    if (Winograd<Vnni, Tiles2x2>::run(conv, weight, code)) return "winograd";
  }
  Driver<Vnni>(conv).run();
  return "direct";
}

}  // namespace FDDA_ISA
}  // namespace fdda
