// Inputs as the tiles' left operand, without im2col.
//
// The image's rows are copied `pitch` pixels apart: what is right of a row is the left padding of
// the next. Adjacent outputs need, for every tap, inputs that are stride_w pixels apart, and with
// rows sorted by their remainder to stride_h that holds across the ends of rows, too: any 16
// outputs are a tile. The price: `width` outputs are computed a row, of which the last ones do not
// exist.
#pragma once

#include <string.h>

#include "depth_amx.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// What the rows [first, end) of outputs, counted over the images, need.
class InputRows {
 public:
  // Those of one image.
  struct Piece {
    int64_t first_row;  // of outputs
    int64_t outputs;    // the last one exists
    const uint8_t* inputs;
  };

  InputRows(const PackedConv& conv, int64_t first, int64_t end)
      : conv_(conv), first_(first), end_(end) {
    pieces_ = (end - 1) / conv.out_height - first / conv.out_height + 1;
    const int64_t span =
        (conv.out_width - 1) * conv.stride_w + (conv.kernel_w - 1) * conv.dilation_w + 1;
    inside_ = max64(0, min64(conv.width, span - conv.pad_w));
    const int64_t pitch = max64(conv.pad_w + inside_, span - conv.pad_w);
    width_ = max64(conv.out_width, ceil_div(pitch, conv.stride_w));
    pitch_ = width_ * conv.stride_w;
    remainders_ = conv.kernel_h == 1 ? 1 : conv.stride_h;
    const int64_t most = min64(end - first, conv.out_height);
    remainder_rows_ =
        ((most - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h) / conv.stride_h + 1;
    piece_bytes_ = remainders_ * remainder_rows_ * pitch_ * conv.channels;
    // A matrix as it is, unless tiles reach behind it: those of few rows, or of partial blocks.
    const bool matrix = conv.kernel_h * conv.kernel_w * conv.width == 1 &&
                        conv.stride_h * conv.stride_w == 1 && conv.pad_h + conv.pad_w == 0;
    if (matrix && end - first >= kTall && conv.channels / conv.groups % kBlockDepth == 0) {
      inputs_ = conv.x + first * conv.channels;
    }
  }

  int64_t pieces() const { return pieces_; }
  int64_t width() const { return width_; }
  int64_t stride() const { return conv_.stride_w * conv_.channels; }  // in bytes

  Piece piece(int64_t i) const {
    const int64_t image = first_ / conv_.out_height + i;
    const int64_t first = max64(first_, image * conv_.out_height);
    const int64_t end = min64(end_, (image + 1) * conv_.out_height);
    return {first, (end - first - 1) * width_ + conv_.out_width, inputs_ + i * piece_bytes_};
  }

  // Of the steps of a group, offsets[depth.total_steps()].
  void find_steps(const Depth& depth, int64_t* offsets) const {
    for (int64_t run = 0; run < depth.runs; ++run) {
      const int64_t kh = depth.taps_adjacent ? run : run / conv_.kernel_w;
      const int64_t kw = depth.taps_adjacent ? 0 : run % conv_.kernel_w;
      const int64_t below = kh * conv_.dilation_h;
      const int64_t row = below % conv_.stride_h * remainder_rows_ + below / conv_.stride_h;
      const int64_t pixel = row * pitch_ + kw * conv_.dilation_w;
      for (int64_t i = 0; i < depth.steps; ++i) {
        *offsets++ = pixel * conv_.channels + depth.start(i);
      }
    }
  }

  void copy() {
    if (inputs_) return;
    const int64_t bytes = pieces_ * piece_bytes_;
    const int64_t behind = conv_.pad_w * conv_.channels + kTall * stride() + kLineBytes;
    uint8_t* const out = static_cast<uint8_t*>(scratch(kSharedRows, bytes + behind));
    inputs_ = out;
    memset(out + bytes, conv_.x_zero_point, conv_.pad_w * conv_.channels);
    const int64_t row_bytes = pitch_ * conv_.channels;
    parallel_for(bytes / row_bytes, ceil_div(65536, row_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) copy_row(row, out + row * row_bytes);
    });
  }

 private:
  void copy_row(int64_t row, uint8_t* out) const {
    const int64_t first = piece(row / (remainders_ * remainder_rows_)).first_row;
    const int64_t remainder = row / remainder_rows_ % remainders_;
    const int64_t y = (first % conv_.out_height + row % remainder_rows_) * conv_.stride_h +
                      remainder - conv_.pad_h;
    const int64_t row_bytes = pitch_ * conv_.channels;
    if (y < 0 || y >= conv_.height) {
      memset(out, conv_.x_zero_point, row_bytes);
      return;
    }
    const int64_t image = first / conv_.out_height;
    const int64_t left = conv_.pad_w * conv_.channels, inside = inside_ * conv_.channels;
    memset(out, conv_.x_zero_point, left);
    memcpy(out + left, conv_.x + (image * conv_.height + y) * conv_.width * conv_.channels, inside);
    memset(out + left + inside, conv_.x_zero_point, row_bytes - left - inside);
  }

  const PackedConv& conv_;
  const int64_t first_, end_;
  int64_t pieces_, inside_, width_, pitch_, remainders_, remainder_rows_, piece_bytes_;
  const uint8_t* inputs_ = nullptr;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
