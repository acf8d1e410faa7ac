// The left operand of a convolution as GEMM: x itself or the im2col matrix. Of a policy it needs:
//
//   kReadsInput        x itself serves as the left operand of a 1x1 convolution
//   copy(dst, x, n, conv), pad(dst, n, conv)
//                      n inputs, or n taps in the padding, of a row of the left operand
//   kFewInputs, copy_few(dst, x)
//                      copies that many, which costs less than the exact number; 0: there is none
#pragma once

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "window.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kPageBytes = 4096;  // addresses that far apart share an L1 set

template <class Policy>
class LeftOperand {
  using Input = typename Policy::Input;

 public:
  explicit LeftOperand(const PackedConv& conv)
      : conv_(conv),
        group_inputs_(conv.channels / conv.groups),
        kernel_row_(conv.kernel_w * group_inputs_),
        depth_(conv.kernel_h * kernel_row_),
        in_place_(Policy::kReadsInput && conv.kernel_h * conv.kernel_w == 1 &&
                  conv.stride_h * conv.stride_w == 1 && conv.pad_h + conv.pad_w == 0 &&
                  group_inputs_ % kBlockDepth == 0 && conv.channels % kPageBytes != 0),
        adjacent_(conv.dilation_w == 1 && conv.groups == 1),
        few_(adjacent_ && conv.kernel_h > 1 && kernel_row_ <= Policy::kFewInputs &&
             padding_is_modest(conv)),
        row_stride_(in_place_ ? conv.channels : gathered_stride()) {}

  // Whether its rows are those of x.
  bool in_place() const { return in_place_; }

  int64_t row_stride() const { return row_stride_; }

  // Before anything is gathered. Kernel rows so short that checks would cost more than their copies
  // come from images with their padding.
  void prepare() {
    if (few_) pad_images();
  }

  // Rows [row, end) of the im2col matrix of a group.
  void gather(int64_t group, int64_t row, int64_t end, Input* out) const {
    int64_t ow = row % conv_.out_width;
    int64_t oh = row / conv_.out_width % conv_.out_height;
    int64_t n = row / (conv_.out_width * conv_.out_height);
    for (; row < end; ++row, out += row_stride_) {
      if (few_) {
        gather_few(n, oh, ow, out);
      } else {
        gather_row(group, n, oh, ow, out);
      }
      if (++ow < conv_.out_width) continue;
      ow = 0;
      if (++oh < conv_.out_height) continue;
      oh = 0;
      ++n;
    }
  }

 private:
  int64_t gathered_stride() const {
    int64_t inputs = ceil_div(depth_, kBlockDepth) * kBlockDepth;
    // copy_few of the last kernel row must not reach the next row, another thread's perhaps.
    if (few_) inputs = max64(inputs, depth_ - kernel_row_ + Policy::kFewInputs);
    return inputs * sizeof(Input) % kPageBytes ? inputs : inputs + 64;
  }

  // Images with their padding.
  void pad_images() {
    const int64_t left = conv_.pad_w * conv_.channels, line = conv_.width * conv_.channels;
    padded_line_ = line + 2 * left;
    padded_height_ = conv_.height + 2 * conv_.pad_h;
    const int64_t lines = conv_.batch * padded_height_;
    padded_ = static_cast<uint8_t*>(scratch(kPadded, lines * padded_line_ + Policy::kFewInputs));
    parallel_for(lines, 64, [&](int64_t begin, int64_t end) {
      uint8_t* out = padded_ + begin * padded_line_;
      for (int64_t i = begin; i < end; ++i, out += padded_line_) {
        const int64_t n = i / padded_height_, ih = i % padded_height_ - conv_.pad_h;
        if (ih < 0 || ih >= conv_.height) {
          memset(out, conv_.x_zero_point, padded_line_);
        } else {
          memset(out, conv_.x_zero_point, left);
          memcpy(out + left, conv_.x + (n * conv_.height + ih) * line, line);
          memset(out + left + line, conv_.x_zero_point, left);
        }
      }
    });
  }

  void gather_few(int64_t n, int64_t oh, int64_t ow, Input* out) const {
    const uint8_t* in = padded_ + (n * padded_height_ + oh * conv_.stride_h) * padded_line_ +
                        ow * conv_.stride_w * conv_.channels;
    for (int64_t kh = 0; kh < conv_.kernel_h; ++kh, out += kernel_row_) {
      if constexpr (Policy::kFewInputs > 0) Policy::copy_few(out, in);
      in += conv_.dilation_h * padded_line_;
    }
  }

  void gather_row(int64_t group, int64_t n, int64_t oh, int64_t ow, Input* out) const {
    const int64_t top = oh * conv_.stride_h - conv_.pad_h, left = ow * conv_.stride_w - conv_.pad_w;
    const uint8_t* image =
        conv_.x + n * conv_.height * conv_.width * conv_.channels + group * group_inputs_;
    const bool whole = adjacent_ && left >= 0 && left + conv_.kernel_w <= conv_.width;
    int64_t first = 0, last = 0;
    if (!whole) valid_taps(left, conv_.width, conv_.kernel_w, conv_.dilation_w, &first, &last);
    for (int64_t kh = 0; kh < conv_.kernel_h; ++kh) {
      const int64_t ih = top + kh * conv_.dilation_h;
      const uint8_t* in = image + (ih * conv_.width + left) * conv_.channels;
      const bool inside = ih >= 0 && ih < conv_.height;
      if (whole && inside) {
        Policy::copy(out, in, kernel_row_, conv_);
        out += kernel_row_;
        continue;
      }
      for (int64_t kw = 0; kw < conv_.kernel_w; ++kw, out += group_inputs_) {
        if (inside && kw >= first && kw < last) {
          Policy::copy(out, in + kw * conv_.dilation_w * conv_.channels, group_inputs_, conv_);
        } else {
          Policy::pad(out, group_inputs_, conv_);
        }
      }
    }
    for (int64_t k = depth_; k % kBlockDepth; ++k) *out++ = 0;
  }

  const PackedConv& conv_;
  const int64_t group_inputs_;
  const int64_t kernel_row_;  // inputs
  const int64_t depth_;
  const bool in_place_;
  const bool adjacent_;  // in memory: the inputs of a kernel row
  const bool few_;       // inputs in a kernel row
  const int64_t row_stride_;
  uint8_t* padded_ = nullptr;
  int64_t padded_line_ = 0, padded_height_ = 0;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
