// Convolution as GEMM on packed weights: unpacking, im2col and the division of work. An instruction
// set supplies a policy:
//
//   Input, Weight      element types of the two operands
//   kColumns           output channels one gemm call covers, a multiple of 16
//   kReadsInput        x itself serves as the left operand of a 1x1 convolution
//   unpack(conv, planes, depth, offset, panel, start)
//                      one panel of 16 channels to ceil(depth/4)*64 weights and 16 start values
//   copy(dst, x, n, conv), pad(dst, n, conv)
//                      n inputs, or n taps in the padding, of a row of the left operand
//   row_sum(row, depth, conv)
//                      sum of (x - x_zero_point) over a row
//   gemm(tile)         all rows times all columns, with the epilogue
//
// gemm may be a member of a policy that knows more about the call.
#pragma once

#include <string.h>

#include "functions.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// Rows of the left operand handled between two passes over the weights: a multiple of the register
// tiles' heights; with 512 * 9 inputs a row this is 270 KiB, which leaves room for weights in L2.
constexpr int64_t kRowBlock = 60;

template <class Policy>
struct Tile {
  const PackedConv* conv;
  const typename Policy::Input* rows;
  int64_t row_stride;
  int64_t num_rows;
  const int32_t* row_sums;  // null unless offsets are applied in the epilogue
  const typename Policy::Weight* panels;
  const int32_t* starts;  // accumulators' initial values, 16 a panel
  int64_t depth_blocks;
  int64_t first_row;
  int64_t first_channel;
  int64_t columns;
};

template <class Policy>
class Driver {
  using Input = typename Policy::Input;
  using Weight = typename Policy::Weight;

 public:
  explicit Driver(const PackedConv& conv, const Policy& policy = Policy())
      : conv_(conv),
        policy_(policy),
        group_inputs_(conv.channels / conv.groups),
        group_outputs_(conv.out_channels / conv.groups),
        depth_(conv.kernel_h * conv.kernel_w * group_inputs_),
        depth_blocks_(ceil_div(depth_, kBlockDepth)),
        row_size_(depth_blocks_ * kBlockDepth),
        panel_size_(depth_blocks_ * kBlockDepth * kPanelRows),
        panels_(ceil_div(group_outputs_, kPanelRows)),
        num_rows_(conv.batch * conv.out_height * conv.out_width),
        direct_(Policy::kReadsInput && conv.kernel_h * conv.kernel_w == 1 &&
                conv.stride_h * conv.stride_w == 1 && conv.pad_h + conv.pad_w == 0 &&
                group_inputs_ % kBlockDepth == 0) {}

  void run() const {
    if (num_rows_ == 0 || conv_.out_channels == 0) return;
    if (ceil_div(num_rows_, kRowBlock) < 2 * num_threads()) {
      split_columns();
    } else {
      split_rows();
    }
  }

 private:
  // Few rows: they are gathered once, each task unpacks the weights of its own columns.
  void split_columns() const {
    Input* rows = nullptr;
    if (!direct_) {
      rows = static_cast<Input*>(
          scratch(kSharedRows, conv_.groups * num_rows_ * row_size_ * sizeof(Input)));
      parallel_for(conv_.groups * num_rows_, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          gather(i % num_rows_, i / num_rows_, rows + i * row_size_);
        }
      });
    }
    const int64_t block_panels = Policy::kColumns / kPanelRows;
    const int64_t blocks = ceil_div(panels_, block_panels);
    parallel_for(conv_.groups * blocks, 1, [&](int64_t begin, int64_t end) {
      int32_t* sums = sums_scratch(num_rows_);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / blocks;
        const int64_t panel = task % blocks * block_panels;
        const int64_t count = min64(block_panels, panels_ - panel);
        const Weights w = local_weights(count);
        for (int64_t p = 0; p < count; ++p) unpack(group, panel + p, w, p);
        multiply(group, panel, w, 0, num_rows_,
                 direct_ ? nullptr : rows + group * num_rows_ * row_size_, sums);
      }
    });
  }

  // Many rows: the weights are unpacked once, each task gathers its own rows.
  void split_rows() const {
    const int64_t total = conv_.groups * panels_;
    const Weights w = weights(scratch(kSharedWeights, weights_bytes(total)), total);
    parallel_for(total, max64(1, 65536 / panel_size_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) unpack(i / panels_, i % panels_, w, i);
    });
    parallel_for(ceil_div(num_rows_, kRowBlock), 1, [&](int64_t begin, int64_t end) {
      int32_t* sums = sums_scratch(kRowBlock);
      Input* rows =
          direct_ ? nullptr
                  : static_cast<Input*>(scratch(kLocalRows, kRowBlock * row_size_ * sizeof(Input)));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kRowBlock;
        const int64_t count = min64(kRowBlock, num_rows_ - first);
        for (int64_t group = 0; group < conv_.groups; ++group) {
          if (rows) {
            for (int64_t i = 0; i < count; ++i) gather(first + i, group, rows + i * row_size_);
          }
          for (int64_t panel = 0; panel < panels_; panel += Policy::kColumns / kPanelRows) {
            const int64_t index = group * panels_ + panel;
            const Weights block{w.panels + index * panel_size_, w.starts + index * kPanelRows};
            multiply(group, panel, block, first, count, rows, sums);
          }
        }
      }
    });
  }

  struct Weights {
    Weight* panels;
    int32_t* starts;
  };

  size_t weights_bytes(int64_t panels) const {
    return panels * (panel_size_ * sizeof(Weight) + kPanelRows * sizeof(int32_t));
  }

  Weights weights(void* memory, int64_t panels) const {
    Weight* first = static_cast<Weight*>(memory);
    return {first, reinterpret_cast<int32_t*>(first + panels * panel_size_)};
  }

  Weights local_weights(int64_t panels) const {
    return weights(scratch(kLocalWeights, weights_bytes(panels)), panels);
  }

  int32_t* sums_scratch(int64_t rows) const {
    if (conv_.weight_fits_s8) return nullptr;
    return static_cast<int32_t*>(scratch(kSums, rows * sizeof(int32_t)));
  }

  void unpack(int64_t group, int64_t panel, const Weights& w, int64_t index) const {
    const int64_t channel = group * group_outputs_ + panel * kPanelRows;
    const int64_t panel_bytes = depth_blocks_ * conv_.bits * kPlaneBytes;
    const uint8_t* planes = conv_.weight + channel / kPanelRows * panel_bytes;
    const int shift = static_cast<int>(channel % kPanelRows);
    int8_t offset[kPanelRows] = {};
    if (conv_.weight_fits_s8) {
      const int64_t count = min64(kPanelRows, group_outputs_ - panel * kPanelRows);
      for (int64_t n = 0; n < count; ++n) {
        offset[n] = static_cast<int8_t>(conv_.weight_offset[channel + n]);
      }
    }
    if (shift) {
      // A group that starts inside a panel: a channel is 4 adjacent bits of a plane, so shifting
      // whole planes aligns it.
      uint8_t* aligned = static_cast<uint8_t*>(scratch(kPlanes, panel_bytes));
      const bool last = channel / kPanelRows + 1 >= ceil_div(conv_.out_channels, kPanelRows);
      for (int64_t i = 0; i < panel_bytes; i += kPlaneBytes) {
        uint64_t low, high = 0;
        memcpy(&low, planes + i, kPlaneBytes);
        if (!last) memcpy(&high, planes + panel_bytes + i, kPlaneBytes);
        low = low >> (kBlockDepth * shift) | high << (64 - kBlockDepth * shift);
        memcpy(aligned + i, &low, kPlaneBytes);
      }
      planes = aligned;
    }
    Policy::unpack(conv_, planes, depth_, offset, w.panels + index * panel_size_,
                   w.starts + index * kPanelRows);
  }

  // Row `row` of the im2col matrix of a group.
  void gather(int64_t row, int64_t group, Input* out) const {
    const int64_t ow = row % conv_.out_width;
    const int64_t oh = row / conv_.out_width % conv_.out_height;
    const int64_t n = row / (conv_.out_width * conv_.out_height);
    const uint8_t* image =
        conv_.x + n * conv_.height * conv_.width * conv_.channels + group * group_inputs_;
    const int64_t left = ow * conv_.stride_w - conv_.pad_w;
    const int64_t last = left + (conv_.kernel_w - 1) * conv_.dilation_w;
    const bool adjacent =
        conv_.dilation_w == 1 && conv_.groups == 1 && left >= 0 && last < conv_.width;
    const int64_t line = conv_.kernel_w * group_inputs_;
    Input* const end = out + row_size_;
    for (int64_t kh = 0; kh < conv_.kernel_h; ++kh) {
      const int64_t ih = oh * conv_.stride_h - conv_.pad_h + kh * conv_.dilation_h;
      if (ih < 0 || ih >= conv_.height) {
        Policy::pad(out, line, conv_);
        out += line;
        continue;
      }
      const uint8_t* in = image + ih * conv_.width * conv_.channels;
      if (adjacent) {
        Policy::copy(out, in + left * conv_.channels, line, conv_);
        out += line;
        continue;
      }
      for (int64_t kw = 0; kw < conv_.kernel_w; ++kw, out += group_inputs_) {
        const int64_t iw = left + kw * conv_.dilation_w;
        if (iw < 0 || iw >= conv_.width) {
          Policy::pad(out, group_inputs_, conv_);
        } else {
          Policy::copy(out, in + iw * conv_.channels, group_inputs_, conv_);
        }
      }
    }
    while (out < end) *out++ = 0;
  }

  void multiply(int64_t group, int64_t panel, const Weights& w, int64_t first, int64_t count,
                const Input* gathered, int32_t* sums) const {
    Tile<Policy> tile;
    tile.conv = &conv_;
    tile.rows = gathered;
    tile.row_stride = row_size_;
    if (direct_) {
      tile.row_stride = conv_.channels;
      tile.rows =
          reinterpret_cast<const Input*>(conv_.x) + first * conv_.channels + group * group_inputs_;
    }
    if (sums) {
      for (int64_t i = 0; i < count; ++i) {
        sums[i] = Policy::row_sum(tile.rows + i * tile.row_stride, depth_, conv_);
      }
    }
    tile.num_rows = count;
    tile.row_sums = sums;
    tile.panels = w.panels;
    tile.starts = w.starts;
    tile.depth_blocks = depth_blocks_;
    tile.first_row = first;
    tile.first_channel = group * group_outputs_ + panel * kPanelRows;
    tile.columns = min64(Policy::kColumns, group_outputs_ - panel * kPanelRows);
    policy_.gemm(tile);
  }

  const PackedConv& conv_;
  const Policy policy_;
  const int64_t group_inputs_, group_outputs_, depth_, depth_blocks_, row_size_, panel_size_,
      panels_, num_rows_;
  const bool direct_;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
