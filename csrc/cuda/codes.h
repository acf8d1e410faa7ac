// Into and out of codes; pointers are device pointers, launch errors are left to cudaGetLastError.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/codes.h"

namespace fdda {
namespace cuda {

void quantize(const Quantize& a, cudaStream_t stream);
void requantize_codes(const RequantizeCodes& a, cudaStream_t stream);
// To codes below 16 that lie packed, see packed.h; a.count is a multiple of 32, and `out` half as
// long.
void requantize_codes_packed(const RequantizeCodes& a, cudaStream_t stream);
void dequantize_codes(const DequantizeCodes& a, cudaStream_t stream);
void dequantize_sums(const DequantizeSums& a, cudaStream_t stream);

}  // namespace cuda
}  // namespace fdda
