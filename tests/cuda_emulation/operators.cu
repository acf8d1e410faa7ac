// The entries of csrc/cuda for test_operators.py.
#include "../../csrc/cuda/packed.h"

extern "C" {

void packed_conv2d(const fdda::PackedConv* conv) { fdda::cuda::packed_conv2d(*conv, nullptr); }

void packed_linear_s32(const fdda::PackedLinearS32* linear) {
  fdda::cuda::packed_linear_s32(*linear, nullptr);
}
}
