// Convolutions of one group as products of matrices on the tensor cores; sm_80 and later.
#pragma once

#include <cuda_runtime_api.h>

#include "../../common/packed.h"
#include "tile.h"

namespace fdda {
namespace cuda {

// Output pixels x channels to a block.
enum class GemmTile { k128x128, k32x64 };

// Whether the kernels below have the convolution.
bool gemm_takes(const PackedConv& conv);

GemmTile gemm_tile(const PackedConv& conv);

// What to multiply, given that inputs are below 2^x_bits; compute_capability: 80, 86, ...
// Packed inputs: their zero point must be below 16, their address and half their channels multiples
// of 16, the weights in halves.
Operands gemm_operands(const PackedConv& conv, int x_bits, int compute_capability);

// The weights of a convolution in the order of weights.h.
void reorder_weights(const uint8_t* packed, int bits, int64_t depth, const GemmWeights& weights,
                     cudaStream_t stream);

// conv.weight is not read: `weights` stands for it.
void conv_gemm(const PackedConv& conv, const GemmWeights& weights, GemmTile tile, Operands operands,
               cudaStream_t stream);

}  // namespace cuda
}  // namespace fdda
