// The left operand of a convolution without im2col: the lines of padded images themselves. The
// inputs of a kernel row are adjacent in memory; those of adjacent outputs in a line of outputs are
// stride_w pixels further on.
#pragma once

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "window.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// What lines [first, end) of outputs, counted over the images, need.
class InputLines {
 public:
  // Whether it pays: not for lines so short that tiles of rows would be mostly empty.
  static bool apply(const PackedConv& conv) {
    return conv.groups == 1 && conv.dilation_w == 1 && conv.out_width >= kFewPixels &&
           padding_is_modest(conv) &&
           conv.kernel_h * conv.kernel_w * conv.stride_h * conv.stride_w > 1;
  }

  InputLines(const PackedConv& conv, int64_t first, int64_t end)
      : conv_(conv),
        first_(first),
        end_(end),
        first_image_(first / conv.out_height),
        images_((end - 1) / conv.out_height - first_image_ + 1),
        span_((conv.out_width - 1) * conv.stride_w + conv.kernel_w),
        image_lines_((min64(end - first, conv.out_height) - 1) * conv.stride_h +
                     (conv.kernel_h - 1) * conv.dilation_h + 1) {
    in_place_ = conv.pad_h + conv.pad_w == 0 && conv.kernel_w * conv.channels % kBlockDepth == 0;
    pitch_ = (in_place_ ? conv.width : span_) * conv.channels;
    // Lines should not share cache sets.
    if (!in_place_ && pitch_ % 4096 == 0) pitch_ += 64;
  }

  // Bytes from a kernel row's inputs to those of the next.
  int64_t kernel_step() const { return conv_.dilation_h * pitch_; }

  // The first input of line `line` of outputs.
  const uint8_t* at(int64_t line) const {
    const int64_t image = line / conv_.out_height, y = line % conv_.out_height;
    if (in_place_) return conv_.x + (image * conv_.height + y * conv_.stride_h) * pitch_;
    const int64_t i = image - first_image_;
    return copy_ + (i * image_lines_ + (y - first_line(i)) * conv_.stride_h) * pitch_;
  }

  void copy() {
    if (in_place_) return;
    const int64_t lines = images_ * image_lines_;
    // A kernel row is read in whole blocks.
    uint8_t* const out = static_cast<uint8_t*>(scratch(kSharedRows, lines * pitch_ + kBlockDepth));
    parallel_for(lines, ceil_div(65536, pitch_), [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) copy_line(line, out + line * pitch_);
    });
    copy_ = out;
  }

  // Lines of inputs from the first one on.
  int64_t count() const {
    return (at(end_ - 1) - at(first_)) / pitch_ + (conv_.kernel_h - 1) * conv_.dilation_h + 1;
  }

  // Per output, the sum of (x - x_zero_point) over its window. `line_sums`, [count()][out_width]:
  // room for those of the windows' rows.
  template <class Policy>
  void sum_rows(int32_t* line_sums, int32_t* out) const {
    const int64_t width = conv_.out_width, step = conv_.stride_w * conv_.channels;
    const int64_t size = conv_.kernel_w * conv_.channels, lines = count();
    const uint8_t* const base = at(first_);
    parallel_for(lines, ceil_div(65536, pitch_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Policy::sum_rows(base + i * pitch_, step, size, width, conv_, line_sums + i * width);
      }
    });
    for (int64_t line = first_; line < end_; ++line, out += width) {
      const int32_t* row = line_sums + (at(line) - base) / pitch_ * width;
      memcpy(out, row, width * sizeof(int32_t));
      for (int64_t kh = 1; kh < conv_.kernel_h; ++kh) {
        row += conv_.dilation_h * width;
        for (int64_t j = 0; j < width; ++j) out[j] += row[j];
      }
    }
  }

 private:
  static constexpr int64_t kFewPixels = 12;

  int64_t first_line(int64_t i) const { return i ? 0 : first_ % conv_.out_height; }

  void copy_line(int64_t line, uint8_t* out) const {
    const int64_t i = line / image_lines_, zero_point = conv_.x_zero_point;
    const int64_t y = first_line(i) * conv_.stride_h + line % image_lines_ - conv_.pad_h;
    const int64_t bytes = span_ * conv_.channels;
    if (y < 0 || y >= conv_.height) {
      memset(out, zero_point, bytes);
      return;
    }
    const int64_t left = min64(span_, conv_.pad_w) * conv_.channels;
    const int64_t inside = min64(conv_.width * conv_.channels, bytes - left);
    memset(out, zero_point, left);
    const int64_t row = (first_image_ + i) * conv_.height + y;
    memcpy(out + left, conv_.x + row * conv_.width * conv_.channels, inside);
    memset(out + left + inside, zero_point, bytes - left - inside);
  }

  const PackedConv& conv_;
  const int64_t first_, end_, first_image_, images_;
  const int64_t span_;         // pixels of a line that outputs need
  const int64_t image_lines_;  // that the outputs of an image need
  bool in_place_;              // x itself has them
  int64_t pitch_;              // bytes
  const uint8_t* copy_ = nullptr;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
