// The left operand of a convolution as GEMM: x itself or the im2col matrix. Of a policy it needs:
//
//   kReadsInput        x itself serves as the left operand of a 1x1 convolution
//   copy(dst, x, n, conv), pad(dst, n, conv)
//                      n inputs, or n taps in the padding, of a row of the left operand
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
        row_stride_(in_place_ ? conv.channels : gathered_stride()) {}

  // Whether its rows are those of x.
  bool in_place() const { return in_place_; }

  int64_t row_stride() const { return row_stride_; }

  // Rows [row, end) of the im2col matrix of a group.
  void gather(int64_t group, int64_t row, int64_t end, Input* out) const {
    int64_t ow = row % conv_.out_width;
    int64_t oh = row / conv_.out_width % conv_.out_height;
    int64_t n = row / (conv_.out_width * conv_.out_height);
    for (; row < end; ++row, out += row_stride_) {
      gather_row(group, n, oh, ow, out);
      if (++ow < conv_.out_width) continue;
      ow = 0;
      if (++oh < conv_.out_height) continue;
      oh = 0;
      ++n;
    }
  }

 private:
  int64_t gathered_stride() const {
    const int64_t inputs = ceil_div(depth_, kBlockDepth) * kBlockDepth;
    return inputs * sizeof(Input) % kPageBytes ? inputs : inputs + 64;
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
  const int64_t row_stride_;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
