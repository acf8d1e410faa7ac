// Convolution as GEMM on packed weights: unpacking and the division of work. An instruction set
// supplies a policy:
//
//   Input, Weight      element types of the two operands; what else the left one needs is in
//                      left_operand.h
//   kMinColumns, kMaxColumns
//                      output channels one gemm call covers, multiples of 16
//   kReadsLines        whether gemm takes rows in segments, input_lines.h's
//   kUnpacksCheaply    next to kManyRows rows, again and again
//   unpack(conv, planes, depth, offset, panel, start)
//                      one panel of 16 channels to ceil(depth/4)*64 weights and 16 start values
//   sum_rows(rows, stride, depth, count, conv, sums)
//                      sums of (x - x_zero_point) over rows
//   finish_sums(sums, count)
//                      such sums as gemm and gemm_planes want them, if kReadsLines
//   gemm(tile)         all rows times all columns, with the epilogue; may be a member of a policy
//                      that knows more about the call
//   kFuses; fuses(rows), gemm_planes(tile, planes, depth)
//                      gemm straight from the planes, for so few rows; all offsets are applied in
//                      the epilogue
#pragma once

#include <string.h>

#include "functions.h"
#include "input_lines.h"
#include "left_operand.h"
#include "operand_ranges.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kBlockBytes = int64_t{1} << 19;  // of rows at a time: they stay in L2
constexpr int64_t kTaskBytes = 16384;              // of weights: L1 holds them, and inputs
constexpr int64_t kFewRows = 60;                   // next to weights that are unpacked already
constexpr int64_t kManyRows = 256;                 // next to which unpacking costs little

// What policies have that unpack all weights before many rows and know no other ways.
struct SimplePolicy {
  static constexpr int64_t kMinColumns = 64, kMaxColumns = 64;
  static constexpr bool kUnpacksCheaply = false;
  static constexpr bool kFuses = false;
  static constexpr bool kReadsLines = false;
};

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
  int64_t segment_blocks;  // of these; the same unless kReadsLines
  int64_t segment_step;    // bytes from the inputs of a segment to those of the next
  int64_t first_row;
  int64_t first_channel;
  int64_t columns;
  const uint8_t* ahead;  // planes of the next task, to be fetched meanwhile
  int64_t ahead_bytes;   // of them, 0 if there is none
  int64_t rows_before;   // of the same task
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
        reads_lines_(Policy::kReadsLines && InputLines::apply(conv)),
        segment_blocks_(
            ceil_div(reads_lines_ ? conv.kernel_w * group_inputs_ : depth_, kBlockDepth)),
        depth_blocks_(reads_lines_ ? conv.kernel_h * segment_blocks_ : segment_blocks_),
        panel_size_(depth_blocks_ * kBlockDepth * kPanelRows),
        plane_bytes_(ceil_div(depth_, kBlockDepth) * conv.bits * kPlaneBytes),
        panels_(ceil_div(group_outputs_, kPanelRows)),
        num_rows_(conv.batch * conv.out_height * conv.out_width),
        task_panels_(task_panels()),
        tasks_(conv.groups * ceil_div(panels_, task_panels_)),
        operand_(conv),
        largest_offset_(largest_offset(conv)) {}

  // Each thread has its own rows and unpacks all weights for them or, where that is dear, all were
  // unpacked before. Few rows are shared, and each thread has its own columns.
  void run() {
    if (num_rows_ == 0 || conv_.out_channels == 0) return;
    const int64_t threads = num_threads();
    bool own_rows;
    int64_t rows = kFewRows;
    if (Policy::kUnpacksCheaply) {
      const bool even_columns = tasks_ % threads == 0 || tasks_ >= 4 * threads;
      own_rows = num_rows_ >= (even_columns ? kManyRows : 16) * threads;
      int64_t parts = ceil_div(num_rows_, rows_at_once());
      if (own_rows) parts = ceil_div(parts, threads) * threads;
      rows = ceil_div(num_rows_, parts);
    } else {
      own_rows = ceil_div(num_rows_, kFewRows) >= 2 * threads;
      if (own_rows) {
        unpack_all();
      } else {
        rows = num_rows_;
      }
    }
    if (reads_lines_) rows = ceil_div(rows, conv_.out_width) * conv_.out_width;
    const int64_t parts = ceil_div(num_rows_, rows);
    parallel_for(parts, own_rows ? 1 : parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        run_part(part * rows, min64((part + 1) * rows, num_rows_), own_rows);
      }
    });
  }

 private:
  static constexpr int64_t kMinPanels = Policy::kMinColumns / kPanelRows;
  static constexpr int64_t kMaxPanels = Policy::kMaxColumns / kPanelRows;

  struct Rows {
    const Input* first;    // of group 0
    int64_t group_stride;  // in inputs
    const int32_t* sums;   // [groups][count], or null
    int64_t first_row, count;
    const InputLines* lines;  // instead of `first`, or null
  };

  struct Weights {
    Weight* panels;
    int32_t* starts;

    Weights from(int64_t panel, int64_t panel_size) const {
      return {panels + panel * panel_size, starts + panel * kPanelRows};
    }
  };

  // Whether sum (x - x_zero_point) * (code + offset) might leave int32.
  bool wide_sums() const {
    const int64_t largest_weight = largest_offset_ + (int64_t{1} << (conv_.bits - 1));
    return largest_weight > ((int64_t{1} << 31) - 1) / (255 * max64(depth_, 1));
  }

  bool offsets_in_epilogue(int64_t rows) const {
    if constexpr (Policy::kFuses) {
      if (Policy::fuses(rows)) return largest_offset_ > 0;
    }
    return !conv_.weight_fits_s8;
  }

  // The more outputs of a row are stored one after the other, the better.
  int64_t task_panels() const {
    if (num_rows_ < kManyRows * num_threads()) return kMinPanels;
    const int64_t panel_bytes = max64(1, panel_size_ * sizeof(Weight));
    const int64_t fit = kTaskBytes / panel_bytes / kMinPanels * kMinPanels;
    return max64(kMinPanels, min64(kMaxPanels, fit));
  }

  // As many as L2 holds together with their outputs, but no few for the outputs' sake.
  int64_t rows_at_once() const {
    const int64_t inputs =
        reads_lines_
            ? min64(conv_.stride_h, conv_.height) * conv_.stride_w * conv_.channels
            : operand_.row_stride() * sizeof(Input) * (operand_.in_place() ? 1 : conv_.groups);
    const int64_t outputs = conv_.out_channels * (conv_.epilogue.out_u8 ? 1 : sizeof(float));
    const int64_t many = min64(kManyRows, 2 * kBlockBytes / max64(1, inputs));
    return max64(1, max64(many, kBlockBytes / (inputs + outputs)));
  }

  // `alone`: on one thread, there are others for other rows.
  void run_part(int64_t first_row, int64_t end_row, bool alone) const {
    const int64_t count = end_row - first_row;
    Rows rows{nullptr, group_inputs_, nullptr, first_row, count, nullptr};
    if (reads_lines_) {
      InputLines lines(conv_, first_row / conv_.out_width, end_row / conv_.out_width);
      lines.copy();
      rows.lines = &lines;
      if constexpr (Policy::kReadsLines) {
        if (!conv_.weight_fits_s8) {
          const int64_t line_sums = lines.count() * conv_.out_width;
          int32_t* const sums =
              static_cast<int32_t*>(scratch(kSums, (count + line_sums) * sizeof(int32_t)));
          lines.template sum_rows<Policy>(sums + count, sums);
          policy_.finish_sums(sums, count);
          rows.sums = sums;
        }
      }
      return multiply_all(rows, alone);
    }
    Input* gathered = nullptr;
    if (operand_.in_place()) {
      rows.first = reinterpret_cast<const Input*>(conv_.x) + first_row * operand_.row_stride();
    } else {
      rows.group_stride = count * operand_.row_stride();
      gathered = static_cast<Input*>(
          scratch(kSharedRows, conv_.groups * rows.group_stride * sizeof(Input)));
      rows.first = gathered;
    }
    int32_t* sums = nullptr;
    if (offsets_in_epilogue(count)) {
      // One more than there are: an epilogue may read two at a time.
      sums = static_cast<int32_t*>(scratch(kSums, (conv_.groups * count + 1) * sizeof(int32_t)));
      sums[conv_.groups * count] = 0;
      rows.sums = sums;
    }
    if (gathered || sums) {
      parallel_for(count, alone ? count : 16, [&](int64_t begin, int64_t end) {
        for (int64_t group = 0; group < conv_.groups; ++group) {
          const Input* row = rows.first + group * rows.group_stride + begin * operand_.row_stride();
          if (gathered) {
            operand_.gather(group, first_row + begin, first_row + end, const_cast<Input*>(row));
          }
          if (!sums) continue;
          int32_t* const own = sums + group * count + begin;
          Policy::sum_rows(row, operand_.row_stride(), depth_, end - begin, conv_, own);
          if constexpr (Policy::kReadsLines) policy_.finish_sums(own, end - begin);
        }
      });
    }
    multiply_all(rows, alone);
  }

  void multiply_all(const Rows& rows, bool alone) const {
    parallel_for(tasks_, alone ? tasks_ : 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) multiply(rows, task);
    });
  }

  // All rows times task_panels_ panels of outputs.
  void multiply(const Rows& rows, int64_t task) const {
    const int64_t group_tasks = tasks_ / conv_.groups;
    const int64_t group = task / group_tasks, panel = task % group_tasks * task_panels_;
    const int64_t count = min64(task_panels_, panels_ - panel);
    Tile<Policy> tile{};
    tile.conv = &conv_;
    if (rows.first) tile.rows = rows.first + group * rows.group_stride;
    tile.row_stride = operand_.row_stride();
    tile.num_rows = rows.count;
    tile.row_sums = rows.sums ? rows.sums + group * rows.count : nullptr;
    tile.wide_sums = wide_sums();
    tile.depth_blocks = depth_blocks_;
    tile.segment_blocks = segment_blocks_;
    tile.first_row = rows.first_row;
    tile.first_channel = group * group_outputs_ + panel * kPanelRows;
    tile.columns = min64(task_panels_ * kPanelRows, group_outputs_ - panel * kPanelRows);
    if constexpr (Policy::kFuses) {
      if (Policy::fuses(rows.count) && !rows.lines) {
        return policy_.gemm_planes(tile, aligned_planes(tile.first_channel, count), depth_);
      }
    }
    Weights w;
    if (all_.panels) {
      w = all_.from(group * panels_ + panel, panel_size_);
    } else {
      w = weights(scratch(kLocalWeights, weights_bytes(count)), count);
      unpack(group, panel, count, w);
    }
    tile.panels = w.panels;
    tile.starts = w.starts;
    if (!all_.panels && panel + count < panels_) {
      const int64_t next = (tile.first_channel + tile.columns) / kPanelRows;
      tile.ahead = conv_.weight + next * plane_bytes_;
      tile.ahead_bytes = min64(task_panels_, panels_ - panel - count) * plane_bytes_;
    }
    if (!rows.lines) return policy_.gemm(tile);
    if constexpr (Policy::kReadsLines) {
      const int64_t width = conv_.out_width;
      tile.row_stride = conv_.stride_w * conv_.channels;
      tile.num_rows = width;
      tile.segment_step = rows.lines->kernel_step();
      for (int64_t row = rows.first_row; row < rows.first_row + rows.count; row += width) {
        tile.rows = rows.lines->at(row / width);
        tile.first_row = row;
        if (rows.sums) tile.row_sums = rows.sums + row - rows.first_row;
        policy_.gemm(tile);
        tile.rows_before += width;
      }
    }
  }

  size_t weights_bytes(int64_t panels) const {
    return panels * (panel_size_ * sizeof(Weight) + kPanelRows * sizeof(int32_t));
  }

  Weights weights(void* memory, int64_t panels) const {
    Weight* first = static_cast<Weight*>(memory);
    return {first, reinterpret_cast<int32_t*>(first + panels * panel_size_)};
  }

  void unpack_all() {
    const int64_t total = conv_.groups * panels_;
    all_ = weights(scratch(kSharedWeights, weights_bytes(total)), total);
    parallel_for(total, max64(1, 65536 / max64(1, panel_size_)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        unpack(i / panels_, i % panels_, 1, all_.from(i, panel_size_));
      }
    });
  }

  // `count` panels of a group.
  void unpack(int64_t group, int64_t panel, int64_t count, const Weights& w) const {
    const int64_t channel = group * group_outputs_ + panel * kPanelRows;
    const uint8_t* planes = aligned_planes(channel, count);
    for (int64_t p = 0; p < count; ++p) {
      int8_t offsets[kPanelRows] = {};
      if (conv_.weight_fits_s8) {
        const int64_t present = min64(kPanelRows, group_outputs_ - (panel + p) * kPanelRows);
        for (int64_t j = 0; j < present; ++j) {
          offsets[j] = static_cast<int8_t>(conv_.weight_offset[channel + p * kPanelRows + j]);
        }
      }
      const Weights to = w.from(p, panel_size_);
      unpack_panel(planes + p * plane_bytes_, offsets, to);
    }
  }

  void unpack_panel(const uint8_t* planes, const int8_t* offsets, const Weights& to) const {
    if constexpr (Policy::kReadsLines) {
      if (reads_lines_ && depth_ / conv_.kernel_h % kBlockDepth) {
        const int64_t blocks = ceil_div(depth_, kBlockDepth);
        Weight* const dense = static_cast<Weight*>(
            scratch(kLocalRows, blocks * kBlockDepth * kPanelRows * sizeof(Weight)));
        Policy::unpack(conv_, planes, depth_, offsets, dense, to.starts);
        return separate_segments(reinterpret_cast<const uint32_t*>(dense), blocks,
                                 reinterpret_cast<uint32_t*>(to.panels));
      }
    }
    Policy::unpack(conv_, planes, depth_, offsets, to.panels, to.starts);
  }

  // Blocks of four weights in one byte each, such that every segment starts with a block: zeros
  // fill its last one.
  void separate_segments(const uint32_t* dense, int64_t blocks, uint32_t* out) const {
    const int64_t length = depth_ / conv_.kernel_h;
    for (int64_t kh = 0; kh < conv_.kernel_h; ++kh) {
      for (int64_t b = 0; b < segment_blocks_; ++b, out += kPanelRows) {
        const int64_t k = kh * length + b * kBlockDepth;
        const uint32_t* low = dense + k / kBlockDepth * kPanelRows;
        const uint32_t* high = dense + min64(k / kBlockDepth + 1, blocks - 1) * kPanelRows;
        const int shift = 8 * (k % kBlockDepth);
        const int64_t count = min64(kBlockDepth, length - b * kBlockDepth);
        const uint32_t present = ~uint32_t{0} >> 8 * (kBlockDepth - count);
        for (int64_t j = 0; j < kPanelRows; ++j) {
          const uint64_t two = low[j] | uint64_t{high[j]} << 32;
          out[j] = static_cast<uint32_t>(two >> shift) & present;
        }
      }
    }
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

  const PackedConv& conv_;
  const Policy policy_;
  const int64_t group_inputs_, group_outputs_, depth_;
  const bool reads_lines_;
  const int64_t segment_blocks_,
      depth_blocks_;  // of panels; a segment is the depth or a kernel row
  const int64_t panel_size_, plane_bytes_, panels_, num_rows_, task_panels_, tasks_;
  LeftOperand<Policy> operand_;
  const int64_t largest_offset_;
  Weights all_{};  // of all groups, or null
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
