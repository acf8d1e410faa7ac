// Implicit GEMM: out[m][n] = sum over k of x[m][k] w[n][k]; m counts output pixels, k the taps
// (kernel row, kernel column, channel), and x[m][k] is gathered from the image on the way to shared
// memory. Linear layers and 1x1 convolutions are the case of one tap.
//
//   global ──cp.async──> kStages stages in shared memory ──ldmatrix──> registers ──mma──> sums
//
// A stage has the inputs of kRows pixels x 64 k, and the tiles of weights.h as they lie in memory.
// Sums of the pixels' inputs are taken from the registers: they bring in zero point and offset.
#pragma once

#include "epilogue.h"
#include "gemm.h"
#include "loads.h"

namespace fdda {
namespace cuda {

template <typename Tile, Operands kOperands, int kCopy>
__device__ void multiply_and_store(const PackedConv& conv, const GemmWeights& weights) {
  using S = Stages<Tile, kOperands>;
  const int pixels = static_cast<int>(conv.batch * conv.out_height * conv.out_width);
  const int first_pixel = blockIdx.x * Tile::kRows;
  const int first_channel = blockIdx.y * Tile::kChannels;
  const int steps = static_cast<int>(weights.steps);
  Inputs<Tile, kOperands, kCopy> inputs(conv, first_pixel, pixels);
  Products<Tile, kOperands> products;

  // A group of copies a step, empty behind the last: the wait below counts groups.
  const auto load = [&](int step, int stage) {
    if (step < steps) {
      uint8_t* shared = ptx::dynamic_shared() + stage * S::kBytes;
      inputs.load(shared);
      load_weights<Tile, kOperands>(weights, first_channel / kPanelRows, step,
                                    shared + S::kInputBytes);
    }
    ptx::commit_copies();
  };
  for (int step = 0; step < S::kCount - 1; ++step) load(step, step);
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::wait_copies<S::kCount - 2>();
    __syncthreads();  // all threads' copies are here, and all are done with the stage before
    load(step + S::kCount - 1, stage == 0 ? S::kCount - 1 : stage - 1);
    const uint8_t* shared = ptx::dynamic_shared() + stage * S::kBytes;
    products.add(shared, shared + S::kInputBytes);
    stage = stage + 1 == S::kCount ? 0 : stage + 1;
  }
  store_products(conv, weights, products, first_pixel, first_channel, pixels);
}

// Empty where the processor has no such product: gemm_operands does not choose it there.
template <typename Tile, Operands kOperands, int kCopy>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_gemm_kernel(PackedConv conv, GemmWeights weights) {
  if constexpr (!multiplies_4_bits(kOperands) || ptx::kHasMmaOf4Bits) {
    multiply_and_store<Tile, kOperands, kCopy>(conv, weights);
  }
}

}  // namespace cuda
}  // namespace fdda
