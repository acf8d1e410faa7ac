// Implicit GEMM: out[m][n] = sum over k of x[m][k] w[n][k]; m counts output pixels, k the taps
// (kernel row, kernel column, channel), and x[m][k] is gathered from the image on the way to shared
// memory. Linear layers and 1x1 convolutions are the case of one tap.
//
//   global ──cp.async──> kStages stages in shared memory ──ldmatrix──> registers ──mma──> sums
//
// A stage has the inputs of kRows pixels x 64 k, and the tiles of weights.h as they lie in memory.
// Sums of the pixels' inputs are taken from the registers: they bring in zero point and offset.
#pragma once

#include "../ptx.h"
#include "gemm.h"

namespace fdda {
namespace cuda {

constexpr int kChunk = 16;                       // bytes of the vector accesses
constexpr int kRowChunks = kTileDepth / kChunk;  // of a pixel's inputs in a stage
constexpr int kMmaRows = 16, kMmaChannels = 8, kMmaDepth = 32;

template <int ROWS, int CHANNELS, int WARP_ROWS, int WARP_CHANNELS, int BLOCKS>
struct BlockTile {
  static constexpr int kRows = ROWS, kChannels = CHANNELS;
  static constexpr int kWarpRows = WARP_ROWS, kWarpChannels = WARP_CHANNELS;
  static constexpr int kThreads = ROWS / WARP_ROWS * (CHANNELS / WARP_CHANNELS) * 32;
  static constexpr int kBlocks = BLOCKS;  // to a multiprocessor, bounds the registers
};

using LargeTile = BlockTile<128, 128, 64, 32, 2>;
using SmallTile = BlockTile<32, 64, 32, 16, 4>;

// Within 48 KiB, which every kernel may have.
template <typename Tile, bool kHalves>
struct Stages {
  static constexpr int kInputBytes = Tile::kRows * kTileDepth;
  static constexpr int kBytes = kInputBytes + Tile::kChannels / kPanelRows * tile_bytes(kHalves);
  static constexpr int kCount = 4 * kBytes <= 48 * 1024 ? 4 : 3;
};

// Where a chunk lies in a stage: the 8 rows that ldmatrix reads at once, and the 8 chunks that 8
// threads write at once, must lie in different banks, and two rows of 64 bytes fill all banks.
__device__ inline int swizzled(int row, int chunk) {
  return row * kTileDepth + (chunk ^ (row >> 1 & (kRowChunks - 1))) * kChunk;
}

// A thread's share of the inputs: one chunk of each of kPixels rows, whose position along k is that
// of all. kCopy divides the channels, so that kCopy bytes belong to one tap; 1: without cp.async,
// which has no such size.
// Outside the image, behind the last pixel and behind the last k stands the zero point.
template <typename Tile, int kCopy>
class Inputs {
 public:
  __device__ Inputs(const PackedConv& conv, int first_pixel, int pixels) : conv_(conv) {
    const int width = static_cast<int>(conv.out_width), height = static_cast<int>(conv.out_height);
    for (int i = 0; i < kPixels; ++i) {
      const int pixel = first_pixel + row(i);
      const int n = pixel / width / height;
      y_[i] =
          pixel / width % height * static_cast<int>(conv.stride_h) - static_cast<int>(conv.pad_h);
      x_[i] = pixel % width * static_cast<int>(conv.stride_w) - static_cast<int>(conv.pad_w);
      origin_[i] =
          ((n * static_cast<int>(conv.height) + y_[i]) * static_cast<int>(conv.width) + x_[i]) *
          channels();
      if (pixel >= pixels) y_[i] = kOutside;
    }
    advance(chunk() * kChunk);
  }

  // The next 64 k.
  __device__ void load(uint8_t* stage) {
    const uint32_t fill = conv_.x_zero_point * 0x01010101u;
    uint32_t words[kPixels][kChunk / 4] = {};  // kCopy = 1
#pragma unroll
    for (int byte = 0; byte < kChunk; byte += kCopy) {
      const int dy = tap_row_ * static_cast<int>(conv_.dilation_h);
      const int dx = tap_column_ * static_cast<int>(conv_.dilation_w);
      const int offset = (dy * static_cast<int>(conv_.width) + dx) * channels() + channel_;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        // As unsigned numbers, what is negative is too large.
        const bool inside =
            tap_row_ < static_cast<int>(conv_.kernel_h) &&
            static_cast<unsigned>(y_[i] + dy) < static_cast<unsigned>(conv_.height) &&
            static_cast<unsigned>(x_[i] + dx) < static_cast<unsigned>(conv_.width);
        const uint8_t* source = conv_.x + (origin_[i] + offset);
        uint8_t* shared = stage + swizzled(row(i), chunk()) + byte;
        if constexpr (kCopy == 1) {
          words[i][byte / 4] |= (inside ? *source : fill & 0xff) << byte % 4 * 8;
        } else if (inside) {
          ptx::copy_async<kCopy>(shared, source, kCopy);
        } else if constexpr (kCopy == 4) {
          *reinterpret_cast<uint32_t*>(shared) = fill;
        } else {
          ptx::store_16(shared, {fill, fill, fill, fill});
        }
      }
      advance(kCopy);
    }
    advance(kTileDepth - kChunk);
    if constexpr (kCopy == 1) {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        ptx::store_16(stage + swizzled(row(i), chunk()),
                      {words[i][0], words[i][1], words[i][2], words[i][3]});
      }
    }
  }

 private:
  static constexpr int kPixels = Tile::kRows * kRowChunks / Tile::kThreads;
  static constexpr int kOutside = -(1 << 30);

  __device__ static int row(int i) { return (threadIdx.x + i * Tile::kThreads) / kRowChunks; }
  __device__ static int chunk() { return threadIdx.x % kRowChunks; }

  __device__ int channels() const { return static_cast<int>(conv_.channels); }

  // Along k.
  __device__ void advance(int by) {
    channel_ += by;
    while (channel_ >= channels()) {
      channel_ -= channels();
      if (++tap_column_ == static_cast<int>(conv_.kernel_w)) {
        tap_column_ = 0;
        ++tap_row_;
      }
    }
  }

  const PackedConv& conv_;
  int origin_[kPixels];          // of the window, as an offset into x, maybe outside the image
  int y_[kPixels], x_[kPixels];  // where it is
  int tap_row_ = 0, tap_column_ = 0, channel_ = 0;
};

template <typename Tile, bool kHalves>
__device__ void load_weights(const GemmWeights& weights, int first_panel, int step,
                             uint8_t* stage) {
  constexpr int bytes = tile_bytes(kHalves);
  constexpr int copies = Tile::kChannels / kPanelRows * bytes / (kChunk * Tile::kThreads);
#pragma unroll
  for (int i = 0; i < copies; ++i) {
    const int offset = (threadIdx.x + i * Tile::kThreads) * kChunk;
    const int panel = first_panel + offset / bytes;
    const bool inside = panel < static_cast<int>(weights.panels);
    const int tile = inside ? panel * static_cast<int>(weights.steps) + step : 0;
    ptx::copy_async<kChunk>(stage + offset, weights.tiles + (tile * bytes + offset % bytes),
                            inside ? kChunk : 0);
  }
}

// A warp's products.
template <typename Tile, bool kHalves>
class Products {
 public:
  __device__ void add(const uint8_t* inputs, const uint8_t* tiles) {
    const int lane = threadIdx.x % 32;
    uint32_t words[kPanels][4];
#pragma unroll
    for (int depth = 0; depth < kTileDepth / kMmaDepth; ++depth) {
      if (!kHalves || depth == 0) {
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
          const int panel = first_channel() / kPanelRows + p;
          const uint4 v =
              ptx::load_16(tiles + panel * tile_bytes(kHalves) + depth * 512 + lane * 16);
          words[p][0] = v.x;
          words[p][1] = v.y;
          words[p][2] = v.z;
          words[p][3] = v.w;
        }
      }
      uint32_t b[kChannels][2];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const uint32_t* pair = words[c / 2] + c % 2 * 2;
        b[c][0] = kHalves ? pair[depth] & 0x0f0f0f0f : pair[0];
        b[c][1] = kHalves ? pair[depth] >> 4 & 0x0f0f0f0f : pair[1];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        uint32_t a[4];
        const int row = first_row() + r * kMmaRows + lane % 16;
        ptx::load_matrices(a, inputs + swizzled(row, depth * 2 + lane / 16));
        input_sums[r][0] = ptx::add_bytes(a[2], ptx::add_bytes(a[0], input_sums[r][0]));
        input_sums[r][1] = ptx::add_bytes(a[3], ptx::add_bytes(a[1], input_sums[r][1]));
#pragma unroll
        for (int c = 0; c < kChannels; ++c) ptx::mma_u8_s8(sums[r][c], a, b[c]);
      }
    }
  }

  // Sums of x - zero point: the four lanes of a row have them in parts.
  __device__ void finish_input_sums(uint32_t zero_points) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t& sum = input_sums[r][half];
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        sum -= zero_points;
      }
    }
  }

  // Of the block's tile, of sums[r][c][2 * half + odd] and input_sums[r][half].
  __device__ static int row(int r, int half) {
    return first_row() + r * kMmaRows + half * 8 + threadIdx.x % 32 / 4;
  }
  __device__ static int channel(int c, int odd) {
    return first_channel() + c * kMmaChannels + threadIdx.x % 4 * 2 + odd;
  }

  static constexpr int kRows = Tile::kWarpRows / kMmaRows;
  static constexpr int kChannels = Tile::kWarpChannels / kMmaChannels;
  int32_t sums[kRows][kChannels][4] = {};
  uint32_t input_sums[kRows][2] = {};

 private:
  static constexpr int kPanels = Tile::kWarpChannels / kPanelRows;

  __device__ static int first_row() {
    return threadIdx.x / 32 % (Tile::kRows / Tile::kWarpRows) * Tile::kWarpRows;
  }
  __device__ static int first_channel() {
    return threadIdx.x / 32 / (Tile::kRows / Tile::kWarpRows) * Tile::kWarpChannels;
  }
};

template <typename Tile, bool kHalves, int kCopy>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_gemm_kernel(PackedConv conv, GemmWeights weights) {
  using S = Stages<Tile, kHalves>;
  const int pixels = static_cast<int>(conv.batch * conv.out_height * conv.out_width);
  const int first_pixel = blockIdx.x * Tile::kRows;
  const int first_channel = blockIdx.y * Tile::kChannels;
  const int steps = static_cast<int>(weights.steps);
  Inputs<Tile, kCopy> inputs(conv, first_pixel, pixels);
  Products<Tile, kHalves> products;

  // A group of copies a step, empty behind the last: the wait below counts groups.
  const auto load = [&](int step, int stage) {
    if (step < steps) {
      uint8_t* shared = ptx::dynamic_shared() + stage * S::kBytes;
      inputs.load(shared);
      load_weights<Tile, kHalves>(weights, first_channel / kPanelRows, step,
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
  const uint32_t zero_points = conv.x_zero_point * (steps * kTileDepth);
  products.finish_input_sums(zero_points);

  // sum (x - z) (q + offset) = sum x (q + bias) - z sum (q + bias) + (offset - bias) sum (x - z).
  // All but the product with the offset is modulo 2^32: sum (x - z) q fits int32, its terms need
  // not.
  constexpr uint32_t bias = kHalves ? kHalfBias : 0;
#pragma unroll
  for (int c = 0; c < products.kChannels; ++c) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int channel = first_channel + products.channel(c, odd);
      if (channel >= conv.out_channels) continue;
      const uint32_t weight_sum = conv.x_zero_point * weights.sums[channel] + bias * zero_points;
      const int64_t offset = conv.weight_offset[channel];
#pragma unroll
      for (int r = 0; r < products.kRows; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int pixel = first_pixel + products.row(r, half);
          if (pixel >= pixels) continue;
          const uint32_t inputs = products.input_sums[r][half];
          const uint32_t codes = products.sums[r][c][half * 2 + odd] - weight_sum - bias * inputs;
          store_output(conv.epilogue, pixel * conv.out_channels + channel, channel,
                       static_cast<int32_t>(codes) + offset * static_cast<int32_t>(inputs));
        }
      }
    }
  }
}

}  // namespace cuda
}  // namespace fdda
