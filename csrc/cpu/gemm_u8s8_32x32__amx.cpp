// Packed convolution with tdpbusd: u8 inputs as they are, weights (code + offset) as s8. What
// tiles do not suit is avx512vnni's.

#include "depth_amx.h"
#include "operand_ranges.h"
#include "parallel.h"
#include "row_tiles.h"
#include "rows_amx.h"
#include "store_amx.h"
#include "window.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kBlockBytes = int64_t{1} << 20;  // of inputs and outputs, which L2 holds
constexpr int64_t kManyOutputs = 256;              // enough to expand all weights for them

// Without taps it is a matrix, whose rows may be split anywhere. Else, strides matter only where
// there is a next output: InputRows would make room for it.
PackedConv flattened(PackedConv conv) {
  if (conv.kernel_h * conv.kernel_w == 1 && conv.stride_h * conv.stride_w == 1 &&
      conv.pad_h + conv.pad_w == 0) {
    conv.height = conv.out_height = conv.batch * conv.height * conv.width;
    conv.batch = conv.width = conv.out_width = 1;
  } else {
    if (conv.out_height == 1) conv.stride_h = 1;
    if (conv.out_width == 1) conv.stride_w = 1;
  }
  return conv;
}

// Few outputs fill no tile, few inputs no step, and a panel must belong to one group.
bool applies(const PackedConv& conv) {
  if (conv.channels == 0 || conv.batch == 0 || !padding_is_modest(conv)) return false;
  const PackedConv flat = flattened(conv);
  return flat.out_height * flat.out_width >= kTileRows && Depth::of(conv).step >= 8 &&
         (conv.groups == 1 || conv.out_channels / conv.groups % kPanelRows == 0);
}

// Bound of |sum (x - x_zero_point) * (code + offset)|.
int64_t largest_sum(const PackedConv& conv) {
  const int64_t largest =
      min64(largest_offset(conv), int64_t{1} << 31) + (int64_t{1} << (conv.bits - 1));
  return 255 * largest * (conv.kernel_h * conv.kernel_w * (conv.channels / conv.groups));
}

class Convolution {
 public:
  explicit Convolution(const PackedConv& conv)
      : conv_(flattened(conv)),
        depth_(Depth::of(conv)),
        group_inputs_(conv.channels / conv.groups),
        group_outputs_(conv.out_channels / conv.groups),
        blocks_(ceil_div(group_outputs_, kWide)),
        largest_sum_(largest_sum(conv)) {}

  void run() const {
    const int64_t rows = conv_.batch * conv_.out_height, threads = num_threads();
    const Epilogue& e = conv_.epilogue;
    const int64_t output_bytes = (e.out_u8 ? 1 : sizeof(float)) + (e.residual_u8 ? 1 : 0) +
                                 (e.residual_f32 ? sizeof(float) : 0);
    const int64_t row_bytes = conv_.stride_h * conv_.width * conv_.channels +
                              conv_.out_width * conv_.out_channels * output_bytes;
    const int64_t many = ceil_div(kManyOutputs, conv_.out_width);
    int64_t parts = ceil_div(rows, max64(many, kBlockBytes / row_bytes));
    if (parts > 1 || rows >= many * threads) {
      parts = min64(rows, ceil_div(parts, threads) * threads);
    }
    // A parallel_for within another one runs on its thread.
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        run_part(part * rows / parts, (part + 1) * rows / parts);
      }
    });
  }

 private:
  struct Part {
    InputRows rows;
    Steps steps;
    int32_t* row_sums;  // [groups][pieces][piece_outputs], or null
    int64_t piece_outputs;
  };

  void run_part(int64_t first, int64_t end) const {
    Part part{InputRows(conv_, first, end), {}, nullptr, 0};
    part.rows.copy();
    int64_t* offsets =
        static_cast<int64_t*>(scratch(kPlanes, depth_.total_steps() * sizeof(int64_t)));
    part.rows.find_steps(depth_, offsets);
    part.steps = {offsets, depth_.total_steps(), depth_.weight_bytes()};
    if (!conv_.weight_fits_s8) {
      part.piece_outputs = min64(end - first, conv_.out_height) * part.rows.width();
      const int64_t sums = conv_.groups * part.rows.pieces();
      part.row_sums =
          static_cast<int32_t*>(scratch(kSums, sums * part.piece_outputs * sizeof(int32_t)));
      parallel_for(sums, 1, [&](int64_t begin, int64_t end) {
        const TileConfig config(depth_.step);
        for (int64_t i = begin; i < end; ++i) sum_rows(part, i);
      });
    }
    parallel_for(conv_.groups * blocks_, 1, [&](int64_t begin, int64_t end) {
      const TileConfig config(depth_.step);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / blocks_, column = i % blocks_ * kWide;
        Channels channels;
        channels.first = group * group_outputs_ + column;
        channels.count = min64(kWide, group_outputs_ - column);
        channels.largest_sum = largest_sum_;
        using Codes = StoreAll<false, Residual::kNone>;
        using CodesOfCodes = StoreAll<false, Residual::kCodes>;
        using CodesOfFloats = StoreAll<false, Residual::kFloats>;
        using Floats = StoreAll<true, Residual::kNone>;
        if (Codes::applies(conv_, channels)) {
          run_block<Codes>(part, group, channels);
        } else if (CodesOfCodes::applies(conv_, channels)) {
          run_block<CodesOfCodes>(part, group, channels);
        } else if (CodesOfFloats::applies(conv_, channels)) {
          run_block<CodesOfFloats>(part, group, channels);
        } else if (Floats::applies(conv_, channels)) {
          run_block<Floats>(part, group, channels);
        } else if (conv_.epilogue.out_u8) {
          run_block<Store<false>>(part, group, channels);
        } else {
          run_block<Store<true>>(part, group, channels);
        }
      }
    });
  }

  int8_t* panels(int64_t count) const {
    return static_cast<int8_t*>(scratch(kLocalWeights, count * depth_.panel_bytes()));
  }

  // Sums of (x - x_zero_point): products with ones.
  void sum_rows(const Part& part, int64_t i) const {
    alignas(kLineBytes) int32_t sums[(kTall + 1) * kWide], unused[kPanelRows];
    const InputRows::Piece piece = part.rows.piece(i % part.rows.pieces());
    int32_t* const out = part.row_sums + i * part.piece_outputs;
    int8_t* ones = panels(1);
    unpack(
        depth_, [](int64_t) { return _mm512_set1_epi8(1); }, _mm512_setzero_si512(), ones, unused);
    const int64_t zero_points =
        conv_.x_zero_point * conv_.kernel_h * conv_.kernel_w * group_inputs_;
    for (int64_t q = 0; q < piece.outputs; q += kTall) {
      const int64_t at = max64(0, min64(q, piece.outputs - kTall));
      const Expanded weights{ones, depth_.weight_bytes()};
      multiply_tall<kTallTiles>(part.steps, inputs(part, piece, i / part.rows.pieces(), at),
                                part.rows.stride(), weights, sums, [] {});
      for (int64_t r = 0; r < min64(kTall, piece.outputs); ++r) {
        out[at + r] = static_cast<int32_t>(sums[r * kWide] - zero_points);
      }
    }
  }

  const uint8_t* inputs(const Part& part, const InputRows::Piece& piece, int64_t group,
                        int64_t output) const {
    return piece.inputs + group * group_inputs_ + output * part.rows.stride();
  }

  // All outputs of some channels of a group.
  template <class Store>
  void run_block(const Part& part, int64_t group, Channels& channels) const {
    const int64_t pieces = part.rows.pieces(), width = part.rows.width();
    const bool few =
        pieces == 1 && part.rows.piece(0).outputs <= kTall && Expanding::applies(depth_);
    const int8_t* weights = few ? nullptr : unpack_block(channels);
    const bool tall = few || channels.count <= kPanelRows;
    const int64_t height = tall ? kTall : 2 * kTileRows;
    const int64_t pairs = ceil_div(height / 2, part.steps.count);
    Store store(conv_, channels);
    alignas(kLineBytes) int32_t buffers[2][(kTall + 1) * kWide];
    int turn = 0;
    for (int64_t i = 0; i < pieces; ++i) {
      const InputRows::Piece piece = part.rows.piece(i);
      const int32_t* row_sums =
          part.row_sums ? part.row_sums + (group * pieces + i) * part.piece_outputs : nullptr;
      for (int64_t q = 0; q < piece.outputs; q += height, turn ^= 1) {
        // The last rows' tiles reach back, not behind the inputs.
        const int64_t at = max64(0, min64(q, piece.outputs - height));
        int32_t* const sums = buffers[turn];
        const uint8_t* x = inputs(part, piece, group, at);
        if (few) {
          multiply_few(part, x, piece.outputs, channels, sums);
        } else {
          const Expanded left{weights, depth_.weight_bytes()};
          const Expanded right{weights + depth_.panel_bytes(), depth_.weight_bytes()};
          auto between = [&] { store.some(pairs); };
          if (tall) {
            multiply_tall<kTallTiles>(part.steps, x, part.rows.stride(), left, sums, between);
          } else {
            multiply_square(part.steps, x, part.rows.stride(), left, right, sums, between);
          }
        }
        store.start({piece.first_row + q / width, q % width, width,
                     min64(height, piece.outputs - q), sums + (q - at) * kWide,
                     row_sums ? row_sums + q : nullptr});
      }
    }
    store.finish();
  }

  // No more outputs than a tall block has: every weight is needed once, right after its expansion.
  void multiply_few(const Part& part, const uint8_t* x, int64_t outputs, Channels& channels,
                    int32_t* sums) const {
    for (int64_t p = 0; p * kPanelRows < channels.count; ++p) {
      Expanding weights(depth_, codes(channels, p), offsets(channels, p));
      with_rows<kTallTiles>(ceil_div(outputs, kTileRows), [&](auto tiles) {
        multiply_tall<decltype(tiles)::kCount>(part.steps, x, part.rows.stride(), weights,
                                               sums + p * kPanelRows, [] {});
      });
      _mm512_store_si512(channels.weight_sums + p * kPanelRows, weights.sums());
    }
  }

  const int8_t* unpack_block(Channels& channels) const {
    int8_t* const weights = panels(kWide / kPanelRows);
    for (int64_t p = 0; p * kPanelRows < channels.count; ++p) {
      unpack(depth_, codes(channels, p), offsets(channels, p), weights + p * depth_.panel_bytes(),
             channels.weight_sums + p * kPanelRows);
    }
    return weights;
  }

  // Of panel p of the channels.
  BitMatrices codes(const Channels& channels, int64_t p) const {
    const int64_t blocks = ceil_div(depth_.runs * depth_.run, kBlockDepth);
    const int64_t panel = channels.first / kPanelRows + p;
    const int64_t bytes = blocks * conv_.bits * kPlaneBytes;
    return BitMatrices({conv_.weight + panel * bytes, conv_.bits, blocks * kBlockDepth});
  }

  // What is added to the codes of panel p.
  __m512i offsets(const Channels& channels, int64_t p) const {
    alignas(kLineBytes) int32_t offsets[kPanelRows] = {};
    const int64_t count = min64(kPanelRows, channels.count - p * kPanelRows);
    const int64_t* from = conv_.weight_offset + channels.first + p * kPanelRows;
    for (int64_t n = 0; conv_.weight_fits_s8 && n < count; ++n) {
      offsets[n] = static_cast<uint8_t>(from[n]) * 0x01010101;
    }
    return _mm512_load_si512(offsets);
  }

  const PackedConv conv_;
  const Depth depth_;
  const int64_t group_inputs_, group_outputs_, blocks_;
  const int64_t largest_sum_;
};

}  // namespace

const char* packed_conv2d(const PackedConv& conv) {
  if (!applies(conv)) return avx512vnni::kernels.packed_conv2d(conv);
  Convolution(conv).run();
  return "tiles";
}

void multiply_tiles(int64_t count) {
  alignas(64) uint8_t ones[kTileRows][kLineBytes];
  memset(ones, 1, sizeof ones);  // products with tiles of zeros might be quicker
  const TileConfig config(kLineBytes);
  _tile_loadd(4, ones, kLineBytes);
  _tile_loadd(5, ones, kLineBytes);
  _tile_loadd(6, ones, kLineBytes);
  _tile_loadd(7, ones, kLineBytes);
  for (int64_t i = 0; i < count; i += 4) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
