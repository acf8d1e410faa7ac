#include "gemm.h"

#include "../launch.h"
#include "kernel.h"

namespace fdda {
namespace cuda {
namespace {

constexpr int kReorderThreads = 256;

// One panel a block.
__global__ void __launch_bounds__(kReorderThreads)
    reorder_kernel(const uint8_t* packed, int bits, int64_t depth_blocks, GemmWeights weights) {
  const int thread = threadIdx.x;
  const uint8_t* panel = packed + blockIdx.x * depth_blocks * bits * kPlaneBytes;
  const int tile_words = tile_bytes(in_halves(bits)) / 4;
  const int64_t words = weights.steps * tile_words;
  uint32_t* tiles = reinterpret_cast<uint32_t*>(weights.tiles) + blockIdx.x * words;
  for (int64_t i = thread; i < words; i += kReorderThreads) {
    tiles[i] =
        tile_word(panel, bits, depth_blocks, i / tile_words, static_cast<int>(i % tile_words));
  }

  __shared__ int32_t sums[kReorderThreads];  // of the threads' parts of channel thread % 16
  int32_t sum = 0;
  for (int64_t block = thread / kPanelRows; block < depth_blocks;
       block += kReorderThreads / kPanelRows) {
    const uint32_t codes = block_codes(panel, bits, depth_blocks, thread % kPanelRows, block);
    for (int j = 0; j < 4; ++j) sum += static_cast<int8_t>(codes >> 8 * j);
  }
  sums[thread] = sum;
  __syncthreads();
  if (thread >= kPanelRows) return;
  for (int i = thread + kPanelRows; i < kReorderThreads; i += kPanelRows) sum += sums[i];
  weights.sums[blockIdx.x * kPanelRows + thread] = sum;
}

template <typename Tile>
dim3 grid(const PackedConv& conv) {
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  return dim3(static_cast<unsigned>(ceil_div(pixels, Tile::kRows)),
              static_cast<unsigned>(ceil_div(conv.out_channels, Tile::kChannels)));
}

template <typename Tile, Operands kOperands, int kCopy>
void run(const PackedConv& conv, const GemmWeights& weights, cudaStream_t stream) {
  using S = Stages<Tile, kOperands>;
  launch(conv_gemm_kernel<Tile, kOperands, kCopy>, grid<Tile>(conv), Tile::kThreads,
         S::kCount * S::kBytes, stream, conv, weights);
}

// Bytes that a copy of inputs may have.
int copy_bytes(const PackedConv& conv) {
  for (const int bytes : {16, 8, 4}) {
    if (conv.channels % bytes == 0 && reinterpret_cast<uintptr_t>(conv.x) % bytes == 0) {
      return bytes;
    }
  }
  return 1;
}

template <typename Tile, Operands kOperands>
void run(const PackedConv& conv, const GemmWeights& weights, cudaStream_t stream) {
  if constexpr (reads_packed(kOperands)) {
    return run<Tile, kOperands, 16>(conv, weights, stream);
  } else {
    const int bytes = copy_bytes(conv);
    if (bytes == 16) return run<Tile, kOperands, 16>(conv, weights, stream);
    if (bytes == 8) return run<Tile, kOperands, 8>(conv, weights, stream);
    if constexpr (kOperands != Operands::kU4S4) {
      if (bytes == 4) return run<Tile, kOperands, 4>(conv, weights, stream);
      run<Tile, kOperands, 1>(conv, weights, stream);
    }
  }
}

template <typename Tile>
void run(const PackedConv& conv, const GemmWeights& weights, Operands operands,
         cudaStream_t stream) {
  switch (operands) {
    case Operands::kU8S8: return run<Tile, Operands::kU8S8>(conv, weights, stream);
    case Operands::kU8S4: return run<Tile, Operands::kU8S4>(conv, weights, stream);
    case Operands::kU4S4: return run<Tile, Operands::kU4S4>(conv, weights, stream);
    case Operands::kPackedU8S4: return run<Tile, Operands::kPackedU8S4>(conv, weights, stream);
    case Operands::kPackedU4S4: return run<Tile, Operands::kPackedU4S4>(conv, weights, stream);
  }
}

}  // namespace

// The kernels' offsets into inputs and weights, and their coordinates, are of 32 bits.
bool gemm_takes(const PackedConv& conv) {
  constexpr int64_t limit = 1 << 30, blocks = 65535;
  const int64_t depth = conv.kernel_h * conv.kernel_w * conv.channels;
  return conv.groups == 1 && conv.batch * conv.out_channels > 0 &&
         conv.batch * conv.out_height * conv.out_width < limit &&
         conv.batch * (conv.height + 2 * conv.pad_h) * (conv.width + 2 * conv.pad_w) *
                 conv.channels <
             limit &&
         (conv.out_channels + kPanelRows) * (depth + kTileDepth) < limit &&
         conv.out_channels < blocks * SmallTile::kChannels;
}

// Large tiles read less, but only many of them occupy a GPU.
GemmTile gemm_tile(const PackedConv& conv) {
  constexpr unsigned enough = 80;  // multiprocessors of a GPU of middle size
  const dim3 blocks = grid<LargeTile>(conv);
  return blocks.x * blocks.y < enough ? GemmTile::k32x64 : GemmTile::k128x128;
}

// Inputs that are copied in small pieces wait for those, not for the products.
Operands gemm_operands(const PackedConv& conv, int x_bits, int compute_capability) {
  const bool has_4_bits = compute_capability / 10 == 8;
  if (conv.x_packed) return has_4_bits ? Operands::kPackedU4S4 : Operands::kPackedU8S4;
  if (!in_halves(conv.bits)) return Operands::kU8S8;
  const bool small = x_bits <= 4 && conv.x_zero_point < 16;
  return small && has_4_bits && copy_bytes(conv) >= 8 ? Operands::kU4S4 : Operands::kU8S4;
}

void reorder_weights(const uint8_t* packed, int bits, int64_t depth, const GemmWeights& weights,
                     cudaStream_t stream) {
  launch(reorder_kernel, static_cast<unsigned>(weights.panels), kReorderThreads, 0, stream, packed,
         bits, ceil_div(depth, kBlockDepth), weights);
}

void conv_gemm(const PackedConv& conv, const GemmWeights& weights, GemmTile tile, Operands operands,
               cudaStream_t stream) {
  if (tile == GemmTile::k128x128) return run<LargeTile>(conv, weights, operands, stream);
  run<SmallTile>(conv, weights, operands, stream);
}

}  // namespace cuda
}  // namespace fdda
