// Winograd's F(2x2, 3x3) in 8-bit integers on 256-bit registers, exact: 16 products for 4 outputs
// of a 3x3 convolution instead of 36.
//
//   V = B^T d B + 2 c         of codes d <= c: [0, 4 c], u8. Position (1, 1) is a plain sum, in
//                             [0, 4 c] without the addition.
//   U = (2 G) w (2 G)^T       of weights |w| <= m: at most 4, 6 or 9 m, s8
//   4 y = A^T (sum U V) A     int32
//
// The sums start with what the additions and the inputs' zero point amount to.
//
//   inputs:    [16 positions][tiles][channels] u8
//   weights:   [16 positions][C / 4][16 outputs][4 inputs] s8, a panel of outputs at a time
//   products:  [16 positions][tiles of a group][16 outputs] s32
#pragma once

#include "packed_avx2.h"
#include "winograd_inputs.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kPositions = 16;
constexpr int64_t kInputBytes = int64_t{1} << 20;  // of V at a time: it stays in L2
constexpr int64_t kGroupTiles = 30;                // about as many tiles' products are held at once

template <class Policy>
class Winograd {
 public:
  // Whether U and V fit and the transforms cost less than they save.
  static bool applies(const PackedConv& conv, int64_t weight, int64_t code) {
    return conv.kernel_h == 3 && conv.kernel_w == 3 && conv.stride_h == 1 && conv.stride_w == 1 &&
           conv.pad_h == 1 && conv.pad_w == 1 && conv.dilation_h == 1 && conv.dilation_w == 1 &&
           conv.groups == 1 && conv.channels % kBlockDepth == 0 && conv.weight_fits_s8 &&
           9 * weight <= 127 && 4 * code <= 255 && Policy::exact(9 * weight, 4 * code) &&
           conv.channels >= 16 && conv.batch * conv.height * conv.width > 16;
  }

  Winograd(const PackedConv& conv, int64_t weight, int64_t code)
      : conv_(conv),
        weight_(weight),
        code_(code),
        tiles_x_(ceil_div(conv.width, 2)),
        tiles_y_(ceil_div(conv.height, 2)),
        stride_(ceil_div(conv.channels, kLine) * kLine + kLine) {}

  void run() const {
    const int64_t rows = conv_.batch * tiles_y_, threads = num_threads();
    int64_t blocks = ceil_div(rows * tiles_x_ * stride_ * kPositions, kInputBytes);
    // Many tiles: each thread has its own and expands all weights for them.
    if (blocks > 1 || rows * tiles_x_ >= 64 * threads) {
      blocks = min64(rows, ceil_div(blocks, threads) * threads);
    }
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        run_block(b * rows / blocks, (b + 1) * rows / blocks);
      }
    });
  }

 private:
  static constexpr int64_t kLine = 32;      // channels of a register of V
  static constexpr int64_t kSkew = 3 * 64;  // keeps positions from sharing cache sets

  // Rows of tiles whose inputs are transformed together.
  struct Block {
    int64_t first_row, rows, position_stride;
    uint8_t* inputs;
  };

  void run_block(int64_t first_row, int64_t end_row) const {
    Block b{first_row, end_row - first_row, 0, nullptr};
    b.position_stride = ceil_div(b.rows * tiles_x_ * stride_, 4096) * 4096 + kSkew;
    b.inputs = static_cast<uint8_t*>(scratch(kSharedRows, kPositions * b.position_stride));
    parallel_for(b.rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t c = 0; c < conv_.channels; c += kLine) transform_row(b, row, c);
      }
    });
    parallel_for(ceil_div(conv_.out_channels, kPanelRows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) run_panel(b, panel * kPanelRows);
    });
  }

  // ---- inputs ----

  void transform_row(const Block& b, int64_t row, int64_t channel) const {
    const int64_t n = (b.first_row + row) / tiles_y_, ty = (b.first_row + row) % tiles_y_;
    const __m256i lanes = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i valid =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(conv_.channels - channel)), lanes);
    const __m256i zero = _mm256_set1_epi8(static_cast<char>(conv_.x_zero_point));
    const __m256i shift = _mm256_set1_epi8(static_cast<char>(2 * code_));
    const uint8_t* lines[4];  // null: outside
    for (int i = 0; i < 4; ++i) {
      const int64_t y = 2 * ty - 1 + i;
      const uint8_t* line = conv_.x + (n * conv_.height + y) * conv_.width * conv_.channels;
      lines[i] = y >= 0 && y < conv_.height ? line + channel : nullptr;
    }
    typedef uint8_t Bytes __attribute__((vector_size(kLine)));
    auto read = [&](int64_t x, Bytes* d) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        d[i] = (Bytes)zero;
        if (!lines[i] || x < 0 || x >= conv_.width) continue;
        const void* from = lines[i] + x * conv_.channels;
        d[i] = (Bytes)_mm256_maskload_epi32(static_cast<const int*>(from), valid);
      }
    };
    uint8_t* const out = b.inputs + row * tiles_x_ * stride_ + channel;
    transform_inputs(tiles_x_, (Bytes)shift, b.position_stride, read,
                     [&](int64_t tile) { return out + tile * stride_; });
  }

  // ---- weights ----

  // 2 G in one direction.
  static void transform(const __m256i* g, int step, __m256i* u, int u_step) {
    const __m256i s = _mm256_add_epi8(g[0], g[2 * step]);
    u[0] = _mm256_add_epi8(g[0], g[0]);
    u[u_step] = _mm256_add_epi8(s, g[step]);
    u[2 * u_step] = _mm256_sub_epi8(s, g[step]);
    u[3 * u_step] = _mm256_add_epi8(g[2 * step], g[2 * step]);
  }

  // U of a panel and its sums over the inputs, [16 positions][16 outputs].
  template <int BITS>
  void expand_weights(int64_t channel, int8_t* weights, int64_t step, int32_t* sums) const {
    const int64_t k4 = conv_.channels / kBlockDepth, line = kPanelRows * kBlockDepth;
    const uint8_t* planes = conv_.weight + channel / kPanelRows * 9 * k4 * BITS * kPlaneBytes;
    int8_t offset[kPanelRows] = {};
    for (int64_t j = 0; j < min64(kPanelRows, conv_.out_channels - channel); ++j) {
      offset[j] = static_cast<int8_t>(conv_.weight_offset[channel + j]);
    }
    for (int half = 0; half < 2; ++half) {
      const __m256i offsets = spread_offsets(offset, half);
      __m256i totals[kPositions] = {};
      for (int64_t k = 0; k < k4; ++k) {
        __m256i g[9], rows[12], u[kPositions];
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) {
          const uint8_t* block = planes + (t * k4 + k) * BITS * kPlaneBytes;
          g[t] = expand_half<BITS>(block, half, offsets);
          if (half == 1) {  // likely the next panel to be expanded
            _mm_prefetch(block + 9 * k4 * BITS * kPlaneBytes, _MM_HINT_T1);
          }
        }
#pragma GCC unroll 3
        for (int x = 0; x < 3; ++x) transform(g + x, 3, rows + x, 3);
#pragma GCC unroll 4
        for (int y = 0; y < 4; ++y) transform(rows + 3 * y, 1, u + 4 * y, 1);
#pragma GCC unroll 16
        for (int p = 0; p < kPositions; ++p) {
          store(weights + p * step + k * line + half * line / 2, u[p]);
          totals[p] = _mm256_add_epi32(totals[p], sum_of_fours(u[p]));
        }
      }
      for (int p = 0; p < kPositions; ++p) store(sums + p * kPanelRows + half * kHalf, totals[p]);
    }
  }

  // The sums' starts, in place of the sums of U. Position (1, 1) enters all four outputs, and its U
  // is the sum of all taps.
  void make_starts(int32_t* sums) const {
    for (int p = 0; p < kPositions; ++p) {
      const int32_t factor = static_cast<int32_t>(p == 5 ? 4 * conv_.x_zero_point : 2 * code_);
      for (int j = 0; j < kPanelRows; ++j) sums[p * kPanelRows + j] *= -factor;
    }
  }

  // ---- products and outputs ----

  void run_panel(const Block& b, int64_t channel) const {
    const int64_t step = conv_.channels * kPanelRows + kSkew;  // bytes from position to position
    int8_t* weights = static_cast<int8_t*>(scratch(kLocalWeights, kPositions * step));
    alignas(32) int32_t starts[kPositions * kPanelRows];
    switch (conv_.bits) {
      case 2: expand_weights<2>(channel, weights, step, starts); break;
      case 3: expand_weights<3>(channel, weights, step, starts); break;
      default: expand_weights<4>(channel, weights, step, starts);
    }
    make_starts(starts);
    const int64_t group_rows = max64(1, kGroupTiles / tiles_x_);
    const int64_t product_stride = group_rows * tiles_x_ * kPanelRows;
    int32_t* products = static_cast<int32_t*>(
        scratch(kLocalRows, (kPositions + 1) * product_stride * sizeof(int32_t)));
    for (int64_t row = 0; row < b.rows; row += group_rows) {
      const int64_t rows = min64(group_rows, b.rows - row);
      for (int p = 0; p < kPositions; ++p) {
        const bool middle_row = p / 4 % 3 != 0, middle_column = p % 4 % 3 != 0;
        const int64_t taps = (middle_row ? 3 : 2) * (middle_column ? 3 : 2);
        const Policy policy = Policy::of_ranges(taps * weight_, 4 * code_);
        const char* x = reinterpret_cast<const char*>(b.inputs) + p * b.position_stride +
                        row * tiles_x_ * stride_;
        const char* w = reinterpret_cast<const char*>(weights) + p * step;
        for_each_row_tile<kTileRows>(rows * tiles_x_, [&](auto height, int64_t first) {
          multiply<decltype(height)::kCount>(policy, x + first * stride_, stride_, w,
                                             conv_.channels / kBlockDepth, starts + p * kPanelRows,
                                             products + p * product_stride + first * kPanelRows);
        });
      }
      for (int64_t r = 0; r < rows; ++r) {
        store_row(b.first_row + row + r, channel, products + r * tiles_x_ * kPanelRows,
                  product_stride, products + kPositions * product_stride);
      }
    }
  }

  // Outputs of a row of tiles. `line` holds the sums of a row of outputs.
  void store_row(int64_t row, int64_t channel, const int32_t* products, int64_t stride,
                 int32_t* line) const {
    const int64_t n = row / tiles_y_, y = row % tiles_y_ * 2;
    const int64_t count = min64(kPanelRows, conv_.out_channels - channel);
    for (int i = 0; i < 2 && y + i < conv_.height; ++i) {
      for (int64_t j = 0; j < tiles_x_ * kPanelRows; j += kHalf) {
        const int64_t tile = j / kPanelRows, half = j % kPanelRows;
        __m256i m[4];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          const __m256i m1 = load(products + (4 + p) * stride + j);
          const __m256i m2 = load(products + (8 + p) * stride + j);
          const __m256i m03 = load(products + (12 * i + p) * stride + j);
          m[p] = i ? _mm256_sub_epi32(_mm256_sub_epi32(m1, m2), m03)
                   : _mm256_add_epi32(_mm256_add_epi32(m1, m2), m03);
        }
        int32_t* out = line + tile * 2 * kPanelRows + half;
        const __m256i left = _mm256_add_epi32(_mm256_add_epi32(m[1], m[2]), m[0]);
        const __m256i right = _mm256_sub_epi32(_mm256_sub_epi32(m[1], m[2]), m[3]);
        store(out, _mm256_srai_epi32(left, 2));
        store(out + kPanelRows, _mm256_srai_epi32(right, 2));
      }
      const int64_t pixel = (n * conv_.height + y + i) * conv_.width;
      store_sums(conv_, {line, nullptr, pixel, conv_.width, channel}, count, true);
    }
  }

  const PackedConv& conv_;
  const int64_t weight_, code_, tiles_x_, tiles_y_, stride_;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
