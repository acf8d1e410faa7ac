// Winograd's F(2x2, 3x3) and F(3x3, 3x3) in 8-bit integers on 256-bit registers, exact: 16 products
// for 4 outputs of a 3x3 convolution instead of 36, or 25 for 9 instead of 81.
//
//   inputs:    [positions][tiles][channels] u8
//   weights:   [positions][C / 4][16 outputs][4 inputs] s8, a panel of outputs at a time
//   products:  [positions][tiles of a group][16 outputs] s32
#pragma once

#include "packed_avx2.h"
#include "winograd_f3.h"
#include "winograd_inputs.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kInputBytes = int64_t{1} << 20;  // of V at a time: it stays in L2
constexpr int64_t kGroupTiles = 30;                // about as many tiles' products are held at once

typedef uint8_t Bytes __attribute__((vector_size(32)));   // added modulo 2^8
typedef uint32_t Words __attribute__((vector_size(32)));  // and 2^32

// F(2x2, 3x3).
//
//   V = B^T d B + 2 c         of codes d <= c: [0, 4 c], u8. Position (1, 1) is a plain sum, in
//                             [0, 4 c] without the addition.
//   U = (2 G) w (2 G)^T       of weights |w| <= m: at most 4, 6 or 9 m, s8
//   4 y = A^T (sum U V) A     int32
struct Tiles2x2 {
  static constexpr int kStep = 2, kPoints = 4, kPositions = kPoints * kPoints;
  static constexpr int kAllTaps = kPoints + 1, kAllTapsFactor = 1;

  // Whether U and V fit, of weights and codes up to these.
  static bool fits(int64_t weight, int64_t code) { return 9 * weight <= 127 && 4 * code <= 255; }

  // Whether the transforms cost less than they save.
  static bool pays(const PackedConv& conv) {
    return conv.channels >= 16 && conv.batch * conv.height * conv.width > 16;
  }

  // |U| of one position, V and what is added to it.
  static int64_t largest_u(int position, int64_t weight) {
    const bool middle_row = position / 4 % 3 != 0, middle_column = position % 4 % 3 != 0;
    return (middle_row ? 3 : 2) * (middle_column ? 3 : 2) * weight;
  }

  static int64_t largest_v(int64_t code) { return 4 * code; }
  static int64_t shift(int64_t code) { return 2 * code; }

  // What the sum of U is subtracted times, for the additions and the inputs' zero point: position
  // (1, 1) enters all four outputs, and its U is the sum of all taps.
  static int64_t start_factor(int position, int64_t code, int64_t zero_point) {
    return position == kAllTaps ? 4 * zero_point : 2 * code;
  }

  template <class Read, class Place>
  static inline __attribute__((always_inline)) void transform_inputs(int64_t tiles, Bytes shift,
                                                                     int64_t stride,
                                                                     const Read& read,
                                                                     const Place& place) {
    FDDA_ISA::transform_inputs(tiles, shift, stride, read, place);
  }

  static inline __attribute__((always_inline)) void transform_weights(const Bytes* g, Bytes* u) {
    Bytes columns[3][kPoints];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) multiply_by_g(g + x, 3, columns[x]);
#pragma GCC unroll 4
    for (int y = 0; y < kPoints; ++y) multiply_by_g(columns[0] + y, kPoints, u + kPoints * y);
  }

  // A^T m.
  static inline __attribute__((always_inline)) void transform_products(const Words* m, Words* y) {
    y[0] = m[1] + m[2] + m[0];
    y[1] = m[1] - m[2] - m[3];
  }

  // y of 4 y.
  static __m256i quotient(Words v) { return _mm256_srai_epi32((__m256i)v, 2); }

 private:
  // 2 G g.
  static inline __attribute__((always_inline)) void multiply_by_g(const Bytes* g, int step,
                                                                  Bytes* u) {
    const Bytes sum = g[0] + g[2 * step];
    u[0] = g[0] + g[0];
    u[1] = sum + g[step];
    u[2] = sum - g[step];
    u[3] = g[2 * step] + g[2 * step];
  }
};

// F(3x3, 3x3), see winograd_f3.h.
struct Tiles3x3 : F3 {
  static int64_t largest_u(int, int64_t weight) { return 63 * weight; }
  static int64_t largest_v(int64_t code) { return kShift + 18 * code; }
  static int64_t shift(int64_t) { return kShift; }

  // At position (1, 1), V of zero points is four of them, and U the sum of all taps.
  static int64_t start_factor(int position, int64_t, int64_t zero_point) {
    return kShift + (position == kAllTaps ? 4 * zero_point : 0);
  }

  static __m256i quotient(Words v) { return _mm256_srai_epi32((__m256i)ninth(v), 2); }
};

template <class Policy, class Tiles>
class Winograd {
  static constexpr int kStep = Tiles::kStep, kPoints = Tiles::kPoints;
  static constexpr int kPositions = Tiles::kPositions;
  static constexpr int64_t kLine = 32;      // channels of a register of V
  static constexpr int64_t kSkew = 3 * 64;  // keeps positions from sharing cache sets

 public:
  // Whether U and V fit and the transforms cost less than they save.
  static bool applies(const PackedConv& conv, int64_t weight, int64_t code) {
    return suits_winograd(conv) && conv.weight_fits_s8 && Tiles::fits(weight, code) &&
           Policy::exact(Tiles::largest_u(Tiles::kAllTaps, weight), Tiles::largest_v(code)) &&
           Tiles::pays(conv);
  }

  // False if it does not apply.
  static bool run(const PackedConv& conv, int64_t weight, int64_t code) {
    if (!applies(conv, weight, code)) return false;
    Winograd(conv, weight, code).run_blocks();
    return true;
  }

 private:
  Winograd(const PackedConv& conv, int64_t weight, int64_t code)
      : conv_(conv),
        weight_(weight),
        code_(code),
        tiles_x_(ceil_div(conv.width, kStep)),
        tiles_y_(ceil_div(conv.height, kStep)),
        stride_(ceil_div(conv.channels, kLine) * kLine + kLine) {}

  void run_blocks() const {
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
    const __m256i shift = _mm256_set1_epi8(static_cast<char>(Tiles::shift(code_)));
    const uint8_t* lines[kPoints];  // null: outside
    for (int i = 0; i < kPoints; ++i) {
      const int64_t y = kStep * ty - 1 + i;
      const uint8_t* line = conv_.x + (n * conv_.height + y) * conv_.width * conv_.channels;
      lines[i] = y >= 0 && y < conv_.height ? line + channel : nullptr;
    }
    auto read = [&](int64_t x, Bytes* d) __attribute__((always_inline)) {
#pragma GCC unroll 5
      for (int i = 0; i < kPoints; ++i) {
        d[i] = (Bytes)zero;
        if (!lines[i] || x < 0 || x >= conv_.width) continue;
        const void* from = lines[i] + x * conv_.channels;
        d[i] = (Bytes)_mm256_maskload_epi32(static_cast<const int*>(from), valid);
      }
    };
    uint8_t* const out = b.inputs + row * tiles_x_ * stride_ + channel;
    Tiles::transform_inputs(tiles_x_, (Bytes)shift, b.position_stride, read,
                            [&](int64_t tile) { return out + tile * stride_; });
  }

  // ---- weights ----

  // U of a panel and its sums over the inputs, [positions][16 outputs].
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
        Bytes g[9], u[kPositions];
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) {
          const uint8_t* block = planes + (t * k4 + k) * BITS * kPlaneBytes;
          g[t] = (Bytes)expand_half<BITS>(block, half, offsets);
          if (half == 1) {  // likely the next panel to be expanded
            _mm_prefetch(block + 9 * k4 * BITS * kPlaneBytes, _MM_HINT_T1);
          }
        }
        Tiles::transform_weights(g, u);
#pragma GCC unroll 25
        for (int p = 0; p < kPositions; ++p) {
          store(weights + p * step + k * line + half * line / 2, (__m256i)u[p]);
          totals[p] = _mm256_add_epi32(totals[p], sum_of_fours((__m256i)u[p]));
        }
      }
      for (int p = 0; p < kPositions; ++p) store(sums + p * kPanelRows + half * kHalf, totals[p]);
    }
  }

  // The sums' starts, in place of the sums of U.
  void make_starts(int32_t* sums) const {
    for (int p = 0; p < kPositions; ++p) {
      const int64_t factor = -Tiles::start_factor(p, code_, conv_.x_zero_point);
      for (int j = 0; j < kPanelRows; ++j) {
        sums[p * kPanelRows + j] *= static_cast<int32_t>(factor);
      }
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
    const int64_t outputs = kStep * kStep * tiles_x_ * kPanelRows;
    int32_t* products = static_cast<int32_t*>(
        scratch(kLocalRows, (kPositions * product_stride + outputs) * sizeof(int32_t)));
    for (int64_t row = 0; row < b.rows; row += group_rows) {
      const int64_t rows = min64(group_rows, b.rows - row);
      for (int p = 0; p < kPositions; ++p) {
        const Policy policy =
            Policy::of_ranges(Tiles::largest_u(p, weight_), Tiles::largest_v(code_));
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

  // Outputs of a row of tiles. `lines` holds their sums.
  void store_row(int64_t row, int64_t channel, const int32_t* products, int64_t stride,
                 int32_t* lines) const {
    const int64_t line = tiles_x_ * kStep * kPanelRows;
    for (int64_t at = 0; at < tiles_x_ * kPanelRows; at += kHalf) {
      Words columns[kPoints][kStep];
#pragma GCC unroll 5
      for (int j = 0; j < kPoints; ++j) {
        Words m[kPoints];
#pragma GCC unroll 5
        for (int i = 0; i < kPoints; ++i) {
          m[i] = (Words)load(products + (kPoints * i + j) * stride + at);
          if (kPoints * i + j == Tiles::kAllTaps) m[i] *= Tiles::kAllTapsFactor;
        }
        Tiles::transform_products(m, columns[j]);
      }
      int32_t* const out = lines + at / kPanelRows * kStep * kPanelRows + at % kPanelRows;
#pragma GCC unroll 3
      for (int i = 0; i < kStep; ++i) {
        Words m[kPoints], y[kStep];
#pragma GCC unroll 5
        for (int j = 0; j < kPoints; ++j) m[j] = columns[j][i];
        Tiles::transform_products(m, y);
#pragma GCC unroll 3
        for (int j = 0; j < kStep; ++j) {
          store(out + i * line + j * kPanelRows, Tiles::quotient(y[j]));
        }
      }
    }
    const int64_t n = row / tiles_y_, y = row % tiles_y_ * kStep;
    const int64_t count = min64(kPanelRows, conv_.out_channels - channel);
    for (int64_t i = 0; i < min64(kStep, conv_.height - y); ++i) {
      const int64_t pixel = (n * conv_.height + y + i) * conv_.width;
      store_sums(conv_, {lines + i * line, nullptr, pixel, conv_.width, channel}, count, true);
    }
  }

  const PackedConv& conv_;
  const int64_t weight_, code_, tiles_x_, tiles_y_, stride_;
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
