// From global to shared memory.
#pragma once

#include "../../common/packed.h"
#include "../ptx.h"
#include "tile.h"

namespace fdda {
namespace cuda {

// A thread's share of the inputs: one chunk of each of kPixels rows, whose position along k is that
// of all. kCopy divides the bytes of a pixel, so that kCopy bytes belong to one tap; 1: without
// cp.async, which has no such size.
// Outside the image, behind the last pixel and behind the last k stands the zero point.
template <typename Tile, Operands kOperands, int kCopy>
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
          pixel_bytes();
      if (pixel >= pixels) y_[i] = kOutside;
    }
    advance(chunk() * kChunk);
  }

  // The next 64 k.
  __device__ void load(uint8_t* stage) {
    if (kIdle && row(0) >= Tile::kRows) return;
    const uint32_t fill =
        conv_.x_zero_point * (reads_packed(kOperands) ? 0x11111111u : 0x01010101u);
    uint32_t words[kPixels][kChunk / 4] = {};  // kCopy = 1
#pragma unroll
    for (int byte = 0; byte < kChunk; byte += kCopy) {
      const int dy = tap_row_ * static_cast<int>(conv_.dilation_h);
      const int dx = tap_column_ * static_cast<int>(conv_.dilation_w);
      const int offset = (dy * static_cast<int>(conv_.width) + dx) * pixel_bytes() + byte_;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        // As unsigned numbers, what is negative is too large.
        const bool inside =
            tap_row_ < static_cast<int>(conv_.kernel_h) &&
            static_cast<unsigned>(y_[i] + dy) < static_cast<unsigned>(conv_.height) &&
            static_cast<unsigned>(x_[i] + dx) < static_cast<unsigned>(conv_.width);
        const uint8_t* source = conv_.x + (origin_[i] + offset);
        uint8_t* shared = stage + swizzled<kRowBytes>(row(i), chunk()) + byte;
        if constexpr (kCopy == 1) {
          words[i][byte / 4] |= (inside ? *source : fill & 0xff) << byte % 4 * 8;
        } else if (inside) {
          ptx::copy_async<kCopy>(shared, source, kCopy);
        } else if constexpr (kCopy == 16) {
          ptx::store_16(shared, {fill, fill, fill, fill});
        } else {
          for (int j = 0; j < kCopy / 4; ++j) reinterpret_cast<uint32_t*>(shared)[j] = fill;
        }
      }
      advance(kCopy);
    }
    advance(kRowBytes - kChunk);
    if constexpr (kCopy == 1) {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        ptx::store_16(stage + swizzled<kRowBytes>(row(i), chunk()),
                      {words[i][0], words[i][1], words[i][2], words[i][3]});
      }
    }
  }

 private:
  static constexpr int kRowBytes = row_bytes(kOperands), kRowChunks = kRowBytes / kChunk;
  static constexpr int kChunks = Tile::kRows * kRowChunks;
  static constexpr bool kIdle = kChunks < Tile::kThreads;  // some threads have no share
  static constexpr int kPixels = kIdle ? 1 : kChunks / Tile::kThreads;
  static constexpr int kOutside = -(1 << 30);

  __device__ static int row(int i) { return (threadIdx.x + i * Tile::kThreads) / kRowChunks; }
  __device__ static int chunk() { return threadIdx.x % kRowChunks; }

  __device__ int pixel_bytes() const {
    return static_cast<int>(conv_.channels) / (reads_packed(kOperands) ? 2 : 1);
  }

  // Along k, in bytes.
  __device__ void advance(int by) {
    byte_ += by;
    while (byte_ >= pixel_bytes()) {
      byte_ -= pixel_bytes();
      if (++tap_column_ == static_cast<int>(conv_.kernel_w)) {
        tap_column_ = 0;
        ++tap_row_;
      }
    }
  }

  const PackedConv& conv_;
  int origin_[kPixels];          // of the window, as an offset into x, maybe outside the image
  int y_[kPixels], x_[kPixels];  // where it is
  int tap_row_ = 0, tap_column_ = 0, byte_ = 0;
};

template <typename Tile, Operands kOperands>
__device__ void load_weights(const GemmWeights& weights, int first_panel, int step,
                             uint8_t* stage) {
  constexpr int bytes = tile_bytes(in_halves(kOperands));
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

}  // namespace cuda
}  // namespace fdda
