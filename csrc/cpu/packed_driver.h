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
//   kFuses; fuses(rows), gemm_planes(tile, planes, depth, offset)
//                      the same straight from the planes, for so few rows
#pragma once

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "window.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kInputBytes = int64_t{1} << 20;  // of the left operand at a time: it stays in L2
constexpr int64_t kPageBytes = 4096;               // addresses that far apart share an L1 set

template <class Policy>
struct Tile {
  const PackedConv* conv;
  const typename Policy::Input* rows;
  int64_t row_stride;
  int64_t num_rows;
  const int32_t* row_sums;  // null unless offsets are applied in the epilogue
  bool wide_sums;           // with offsets, sums might not fit int32
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
  explicit Driver(const PackedConv& conv)
      : conv_(conv),
        group_inputs_(conv.channels / conv.groups),
        group_outputs_(conv.out_channels / conv.groups),
        depth_(conv.kernel_h * conv.kernel_w * group_inputs_),
        depth_blocks_(ceil_div(depth_, kBlockDepth)),
        panel_size_(depth_blocks_ * kBlockDepth * kPanelRows),
        plane_bytes_(depth_blocks_ * conv.bits * kPlaneBytes),
        panels_(ceil_div(group_outputs_, kPanelRows)),
        tasks_(conv.groups * ceil_div(panels_, kTaskPanels)),
        num_rows_(conv.batch * conv.out_height * conv.out_width),
        in_place_(Policy::kReadsInput && conv.kernel_h * conv.kernel_w == 1 &&
                  conv.stride_h * conv.stride_w == 1 && conv.pad_h + conv.pad_w == 0 &&
                  group_inputs_ % kBlockDepth == 0 && conv.channels % kPageBytes != 0),
        row_stride_(in_place_ ? conv.channels : gathered_stride()),
        wide_sums_(sums_may_be_wide()) {}

  // Either each thread has its own rows and unpacks all weights for them, or all share the rows, a
  // part at a time, and each has its own columns.
  void run() const {
    if (num_rows_ == 0 || conv_.out_channels == 0) return;
    const int64_t threads = num_threads();
    const int64_t bytes = num_rows_ * row_stride_ * sizeof(Input) * (in_place_ ? 1 : conv_.groups);
    int64_t parts = ceil_div(bytes, kInputBytes);
    const bool even_columns = tasks_ % threads == 0 || tasks_ >= 4 * threads;
    const bool own_rows = num_rows_ >= (even_columns ? 256 : 16) * threads;
    if (own_rows) parts = min64(num_rows_, ceil_div(parts, threads) * threads);
    parallel_for(parts, own_rows ? 1 : parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        run_part(part * num_rows_ / parts, (part + 1) * num_rows_ / parts);
      }
    });
  }

 private:
  static constexpr int64_t kTaskPanels = Policy::kColumns / kPanelRows;

  struct Rows {
    const Input* first;    // of group 0
    int64_t group_stride;  // in inputs
    const int32_t* sums;   // [groups][count], or null
    int64_t first_row, count;
  };

  struct Weights {
    Weight* panels;
    int32_t* starts;
  };

  // Whether sum (x - x_zero_point) * (code + offset) might leave int32.
  bool sums_may_be_wide() const {
    const int64_t largest =
        ((int64_t{1} << 31) - 1) / (255 * max64(depth_, 1)) - (1 << (conv_.bits - 1));
    for (int64_t o = 0; o < conv_.out_channels; ++o) {
      if (conv_.weight_offset[o] > largest || conv_.weight_offset[o] < -largest) return true;
    }
    return false;
  }

  int64_t gathered_stride() const {
    const int64_t inputs = depth_blocks_ * kBlockDepth;
    return inputs * sizeof(Input) % kPageBytes ? inputs : inputs + 64;
  }

  // A parallel_for within another one runs on its thread.
  void run_part(int64_t first_row, int64_t end_row) const {
    const int64_t count = end_row - first_row;
    Rows rows{nullptr, group_inputs_, nullptr, first_row, count};
    Input* gathered = nullptr;
    if (in_place_) {
      rows.first = reinterpret_cast<const Input*>(conv_.x) + first_row * row_stride_;
    } else {
      rows.group_stride = count * row_stride_;
      gathered = static_cast<Input*>(
          scratch(kSharedRows, conv_.groups * rows.group_stride * sizeof(Input)));
      rows.first = gathered;
    }
    int32_t* sums = nullptr;
    if (!conv_.weight_fits_s8) {
      // One more than there are: an epilogue may read two at a time.
      sums = static_cast<int32_t*>(scratch(kSums, (conv_.groups * count + 1) * sizeof(int32_t)));
      sums[conv_.groups * count] = 0;
      rows.sums = sums;
    }
    if (gathered || sums) {
      parallel_for(count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t group = 0; group < conv_.groups; ++group) {
          const Input* row = rows.first + group * rows.group_stride + begin * row_stride_;
          if (gathered) {
            gather(group, first_row + begin, first_row + end, const_cast<Input*>(row));
          }
          if (!sums) continue;
          for (int64_t i = begin; i < end; ++i, row += row_stride_) {
            sums[group * count + i] = Policy::row_sum(row, depth_, conv_);
          }
        }
      });
    }
    parallel_for(tasks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) multiply(rows, task);
    });
  }

  // All rows times kColumns outputs.
  void multiply(const Rows& rows, int64_t task) const {
    const int64_t group_tasks = tasks_ / conv_.groups;
    const int64_t group = task / group_tasks, panel = task % group_tasks * kTaskPanels;
    const int64_t count = min64(kTaskPanels, panels_ - panel);
    Tile<Policy> tile{};
    tile.conv = &conv_;
    tile.rows = rows.first + group * rows.group_stride;
    tile.row_stride = row_stride_;
    tile.num_rows = rows.count;
    tile.row_sums = rows.sums ? rows.sums + group * rows.count : nullptr;
    tile.wide_sums = wide_sums_;
    tile.depth_blocks = depth_blocks_;
    tile.first_row = rows.first_row;
    tile.first_channel = group * group_outputs_ + panel * kPanelRows;
    tile.columns = min64(Policy::kColumns, group_outputs_ - panel * kPanelRows);
    int8_t offsets[Policy::kColumns] = {};
    if (conv_.weight_fits_s8) {
      for (int64_t j = 0; j < tile.columns; ++j) {
        offsets[j] = static_cast<int8_t>(conv_.weight_offset[tile.first_channel + j]);
      }
    }
    const uint8_t* planes = aligned_planes(tile.first_channel, count);
    if constexpr (Policy::kFuses) {
      if (Policy::fuses(rows.count)) return Policy::gemm_planes(tile, planes, depth_, offsets);
    }
    Weight* panels = static_cast<Weight*>(scratch(
        kLocalWeights, count * (panel_size_ * sizeof(Weight) + kPanelRows * sizeof(int32_t))));
    int32_t* starts = reinterpret_cast<int32_t*>(panels + count * panel_size_);
    for (int64_t p = 0; p < count; ++p) {
      Policy::unpack(conv_, planes + p * plane_bytes_, depth_, offsets + p * kPanelRows,
                     panels + p * panel_size_, starts + p * kPanelRows);
    }
    tile.panels = panels;
    tile.starts = starts;
    Policy::gemm(tile);
  }

  // The planes of `count` panels from any channel on.
  const uint8_t* aligned_planes(int64_t channel, int64_t count) const {
    const uint8_t* planes = conv_.weight + channel / kPanelRows * plane_bytes_;
    const int shift = static_cast<int>(channel % kPanelRows);
    if (!shift) return planes;
    // A group that starts inside a panel: a channel is 4 adjacent bits of a plane, so shifting
    // whole planes aligns it.
    uint8_t* aligned = static_cast<uint8_t*>(scratch(kPlanes, count * plane_bytes_));
    const uint8_t* const end =
        conv_.weight + ceil_div(conv_.out_channels, kPanelRows) * plane_bytes_;
    for (int64_t i = 0; i < count * plane_bytes_; i += kPlaneBytes) {
      uint64_t low, high = 0;
      memcpy(&low, planes + i, kPlaneBytes);
      if (planes + plane_bytes_ + i < end) memcpy(&high, planes + plane_bytes_ + i, kPlaneBytes);
      low = low >> (kBlockDepth * shift) | high << (64 - kBlockDepth * shift);
      memcpy(aligned + i, &low, kPlaneBytes);
    }
    return aligned;
  }

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

  void gather_row(int64_t group, int64_t n, int64_t oh, int64_t ow, Input* out) const {
    const int64_t top = oh * conv_.stride_h - conv_.pad_h, left = ow * conv_.stride_w - conv_.pad_w;
    const uint8_t* image =
        conv_.x + n * conv_.height * conv_.width * conv_.channels + group * group_inputs_;
    const bool adjacent = conv_.dilation_w == 1 && conv_.groups == 1;  // taps of a kernel's row
    const int64_t piece = adjacent ? group_inputs_ * conv_.kernel_w : group_inputs_;
    int64_t first, last;
    valid_taps(left, conv_.width, conv_.kernel_w, conv_.dilation_w, &first, &last);
    const bool whole = adjacent && first == 0 && last == conv_.kernel_w;
    Input* const depth_end = out + depth_;
    for (int64_t kh = 0; kh < conv_.kernel_h; ++kh) {
      const int64_t ih = top + kh * conv_.dilation_h;
      const uint8_t* in = image + (ih * conv_.width + left) * conv_.channels;
      const bool inside = ih >= 0 && ih < conv_.height;
      if (whole && inside) {
        Policy::copy(out, in, piece, conv_);
        out += piece;
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
    memset(depth_end, 0, (depth_blocks_ * kBlockDepth - depth_) * sizeof(Input));
  }

  const PackedConv& conv_;
  const int64_t group_inputs_, group_outputs_, depth_, depth_blocks_, panel_size_, plane_bytes_,
      panels_, tasks_, num_rows_;
  const bool in_place_;
  const int64_t row_stride_;
  const bool wide_sums_;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
