// Matrix products of bfloat16 with sums in float32. Pairs of the depth are put next to one another:
// those of some rows of a, and those of a panel of b, both of which stay in cache.

#include "pairs.h"
#include "parallel.h"
#include "product_pieces.h"
#include "transpose.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

inline uint32_t pair_of(uint16_t first, uint16_t second) {
  return first | static_cast<uint32_t>(second) << 16;
}

// to[n] = the pair of from[n * step] and, where there is one, from[n * step + other]
inline void pack_line(const uint16_t* from, int64_t count, int64_t step, int64_t other, bool both,
                      uint32_t* to) {
  if (step == 1 && both) {
    for (int64_t n = 0; n < count; ++n) to[n] = pair_of(from[n], from[n + other]);
  } else {
    for (int64_t n = 0; n < count; ++n) {
      to[n] = pair_of(from[n * step], both ? from[n * step + other] : 0);
    }
  }
}

// to[k, n] of [pairs of the depth, stride] for `count` vectors, `step` numbers apart, whose numbers
// lie `along` apart.
void pack(const uint16_t* from, int64_t count, int64_t step, int64_t depth, int64_t along,
          int64_t stride, uint32_t* to) {
  const int64_t pairs = ceil_div(depth, 2);
  int64_t done = 0;  // of the vectors
  if (along == 1 && depth % (2 * kVectorLanes) == 0) {
    for (; done + kVectorLanes <= count; done += kVectorLanes) {
      for (int64_t k = 0; k < pairs; k += kVectorLanes) {
        Vector rows[kVectorLanes];
        for (int i = 0; i < kVectorLanes; ++i) {
          memcpy(&rows[i], from + (done + i) * step + 2 * k, sizeof(Vector));
        }
        transpose<1>(rows);
        for (int i = 0; i < kVectorLanes; ++i) {
          memcpy(to + (k + i) * stride + done, &rows[i], sizeof(Vector));
        }
      }
    }
  }
  for (int64_t k = 0; k < pairs; ++k) {
    pack_line(from + done * step + 2 * k * along, count - done, step, along, 2 * k + 1 < depth,
              to + k * stride + done);
  }
}

// Pairs of rows, each `row` numbers from the last, and along a row `step`.
struct PairRows {
  const uint16_t* numbers;
  int64_t row, step;
  uint32_t pair(int64_t r, int64_t k) const {
    uint32_t pair;
    memcpy(&pair, numbers + r * row + k * step, sizeof pair);
    return pair;
  }
};

template <int ROWS, class T>
void multiply(const PairRows& a, int64_t row, const uint32_t* panel, int64_t pairs, int64_t columns,
              T* out, int64_t out_row) {
  Vector sum[ROWS][kVectors] = {};
  for (int64_t k = 0; k < pairs; ++k, panel += kPanel) {
    Bits b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = load_pairs(panel + v * kVectorLanes);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = add_dot(a.pair(row + r, k), b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r, out += out_row) {
    if (columns == kPanel) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store_lanes(out + v * kVectorLanes, sum[r][v]);
    } else {
      float line[kPanel];
      for (int v = 0; v < kVectors; ++v) store_lanes(line + v * kVectorLanes, sum[r][v]);
      for (int64_t n = 0; n < columns; ++n) store_lanes(out + n, line[n]);
    }
  }
}

// A part of the depth, [k, k_end), of some rows and columns of a product.
template <class T>
void multiply_piece(const ProductBFloat16& p, int64_t k, int64_t k_end, int64_t row,
                    int64_t row_end, int64_t column, int64_t column_end, T* out) {
  const int64_t depth = k_end - k, pairs = ceil_div(depth, 2), rows = row_end - row;
  uint32_t* panel =
      static_cast<uint32_t*>(scratch(kLocalWeights, pairs * (kPanel + rows) * sizeof(uint32_t)));
  PairRows a{p.a + row * p.a_row + k, p.a_row, 2};
  if (p.a_depth != 1 || depth % 2) {
    uint32_t* packed = panel + pairs * kPanel;
    pack(p.a + row * p.a_row + k * p.a_depth, rows, p.a_row, depth, p.a_depth, rows, packed);
    a = {reinterpret_cast<const uint16_t*>(packed), 2, 2 * rows};
  }
  for (; column < column_end; column += kPanel) {
    const int64_t columns = min64(kPanel, column_end - column);
    if (columns < kPanel) memset(panel, 0, pairs * kPanel * sizeof(uint32_t));
    pack(p.b + k * p.b_depth + column * p.b_column, columns, p.b_column, depth, p.b_depth, kPanel,
         panel);
    for_each_row_tile<kRows>(rows, [&](auto tile, int64_t first) {
      multiply<decltype(tile)::kCount>(a, first, panel, pairs, columns,
                                       out + (row + first) * p.columns + column, p.columns);
    });
  }
}

}  // namespace

void product_bfloat16(const ProductBFloat16& p) {
  const ProductPieces pieces(1, p.rows, p.depth, p.columns, p.total != nullptr);
  const int64_t size = p.rows * p.columns, parts = pieces.parts;
  float* sums =
      p.total ? static_cast<float*>(scratch(kSums, parts * size * sizeof(float))) : nullptr;
  // Rows are packed once for all panels where they are cut into blocks.
  const int64_t together = pieces.blocks > 1 ? max64(1, pieces.panels) : 1;
  const int64_t count = pieces.count() / together;
  parallel_for(count, pieces.grain(size * p.depth, count), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t panels = pieces.panels / together;
      const int64_t column = t % panels * together * kPanel;
      const int64_t column_end = min64(p.columns, column + together * kPanel);
      const int64_t block = t / panels % pieces.blocks, part = t / (panels * pieces.blocks);
      const auto multiply_to = [&](auto* out) {
        // Parts of an even length: no pair is cut.
        const int64_t k = p.depth / 2 * part / parts * 2;
        const int64_t k_end = part + 1 < parts ? p.depth / 2 * (part + 1) / parts * 2 : p.depth;
        multiply_piece(p, k, k_end, p.rows * block / pieces.blocks,
                       p.rows * (block + 1) / pieces.blocks, column, column_end, out);
      };
      if (p.total) {
        multiply_to(sums + part * size);
      } else {
        multiply_to(reinterpret_cast<BFloat16*>(p.out));
      }
    }
  });
  if (p.total) sum_parts(sums, parts, size, true, p.total);
}

}  // namespace FDDA_ISA
}  // namespace fdda
