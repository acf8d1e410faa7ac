// One kernel a kind of operands, for the compiler's report in test_compiled.py.
#include "../../csrc/cuda/gemm/kernel.h"

namespace fdda {
namespace cuda {

#define FDDA_INSTANCE(operands) \
  template __global__ void conv_gemm_kernel<LargeTile, operands, 16>(PackedConv, GemmWeights);
FDDA_INSTANCE(Operands::kU8S8)
FDDA_INSTANCE(Operands::kU8S4)
FDDA_INSTANCE(Operands::kU4S4)
#undef FDDA_INSTANCE

}  // namespace cuda
}  // namespace fdda
