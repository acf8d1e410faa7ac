// Packed convolution with vpdpbusd on 256-bit registers. Compiled twice, for the VEX and for the
// EVEX encoding: processors have one of them or both.

#include "packed_avx2.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

inline __m256i dpbusd(__m256i acc, __m256i x, __m256i w) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, x, w);
#else
  return _mm256_dpbusd_epi32(acc, x, w);
#endif
}

struct Vnni : U8S8Operands {
  static constexpr int64_t kColumns = 64;

  template <int ROWS>
  void multiply(const Input* x, int64_t stride, const Weight* w, int64_t blocks,
                __m256i (&acc)[ROWS][2]) const {
    for (int64_t k = 0; k < blocks; ++k, x += kBlockDepth, w += kPanelRows * kBlockDepth) {
      const __m256i* b = reinterpret_cast<const __m256i*>(w);
      const __m256i low = _mm256_load_si256(b), high = _mm256_load_si256(b + 1);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const __m256i a = broadcast(x + r * stride);
        acc[r][0] = dpbusd(acc[r][0], a, low);
        FDDA_PIN(acc[r][0]);
        acc[r][1] = dpbusd(acc[r][1], a, high);
        FDDA_PIN(acc[r][1]);
      }
    }
  }

  void gemm(const Tile<Vnni>& t) const { gemm_tiles(*this, t); }
};

}  // namespace

const char* packed_conv2d(const PackedConv& conv) {
  if (conv.groups == conv.channels && conv.groups == conv.out_channels) {
    return avx2::kernels.packed_conv2d(conv);  // depthwise
  }
  Driver<Vnni>(conv).run();
  return "direct";
}

}  // namespace FDDA_ISA
}  // namespace fdda
