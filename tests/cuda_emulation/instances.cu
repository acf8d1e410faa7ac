// One kernel a format of weights, for the compiler's report in test_compiled.py.
#include "../../csrc/cuda/gemm/kernel.h"

namespace fdda {
namespace cuda {

template __global__ void conv_gemm_kernel<LargeTile, false, 16>(PackedConv, GemmWeights);
template __global__ void conv_gemm_kernel<LargeTile, true, 16>(PackedConv, GemmWeights);

}  // namespace cuda
}  // namespace fdda
