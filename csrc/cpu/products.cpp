// Batched products of float32 matrices. A panel of b is packed into the first-level cache and met
// by all rows of a, which are read where they are.

#include "parallel.h"
#include "product_pieces.h"
#include "register_panel.h"
#include "transpose.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kDepth = 256;  // of a panel

// panel[k, n] = b[k, n] of `columns` columns, zeros behind them.
void pack(const Products& p, const float* b, int64_t depth, int64_t columns, float* panel) {
  int64_t whole = 0;  // rows of the panel that are done
  if (p.b_depth == 1 && columns == kPanel) {
    for (; whole + kVectorLanes <= depth; whole += kVectorLanes) {
      for (int64_t n = 0; n < kPanel; n += kVectorLanes) {
        Vector rows[kVectorLanes];
        for (int i = 0; i < kVectorLanes; ++i) {
          rows[i] = load_lanes<Vector>(b + (n + i) * p.b_column + whole);
        }
        transpose<1>(rows);
        for (int i = 0; i < kVectorLanes; ++i) {
          store_lanes(panel + (whole + i) * kPanel + n, rows[i]);
        }
      }
    }
  }
  for (int64_t k = whole; k < depth; ++k) {
    const float* row = b + k * p.b_depth;
    for (int64_t n = 0; n < columns; ++n) panel[k * kPanel + n] = row[n * p.b_column];
    for (int64_t n = columns; n < kPanel; ++n) panel[k * kPanel + n] = 0.0f;
  }
}

// ROWS rows of out, or what is added to them.
template <int ROWS>
void multiply(const Products& p, const float* a, int64_t depth, const float* panel, bool add,
              int64_t columns, float* out) {
  Vector sum[ROWS][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += p.a_depth, panel += kPanel) {
    add_outer_product<ROWS>(a, p.a_row, panel, sum);
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r, out += p.columns) {
    if (columns == kPanel) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* to = out + v * kVectorLanes;
        store_lanes(to, add ? load_lanes<Vector>(to) + sum[r][v] : sum[r][v]);
      }
    } else {
      float line[kPanel];
      for (int v = 0; v < kVectors; ++v) store_lanes(line + v * kVectorLanes, sum[r][v]);
      for (int64_t n = 0; n < columns; ++n) out[n] = add ? out[n] + line[n] : line[n];
    }
  }
}

// out of the rows [row, row_end) and of one panel, whose terms are those of the depth [k, k_end).
void multiply_piece(const Products& p, const float* a, const float* b, int64_t k, int64_t k_end,
                    int64_t row, int64_t row_end, int64_t columns, bool add, float* out) {
  float* panel = static_cast<float*>(scratch(kLocalWeights, kDepth * kPanel * sizeof(float)));
  do {
    const int64_t depth = min64(kDepth, k_end - k);
    pack(p, b + k * p.b_depth, depth, columns, panel);
    for_each_row_tile<kRows>(row_end - row, [&](auto rows, int64_t first) {
      const int64_t r = row + first;
      multiply<decltype(rows)::kCount>(p, a + r * p.a_row + k * p.a_depth, depth, panel, add,
                                       columns, out + r * p.columns);
    });
    add = true;
    k += kDepth;
  } while (k < k_end);
}

}  // namespace

void products(const Products& p) {
  const ProductPieces pieces(p.count, p.rows, p.depth, p.columns, true);
  const int64_t size = p.rows * p.columns, parts = pieces.parts;
  float* sums = parts == 1
                    ? p.out
                    : static_cast<float*>(scratch(kSums, p.count * parts * size * sizeof(float)));
  const bool add = p.add && parts == 1;
  const int64_t grain = pieces.grain(size * p.depth, pieces.count());
  parallel_for(p.count * pieces.count(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t panel = t % pieces.panels, block = t / pieces.panels % pieces.blocks;
      const int64_t sum = t / (pieces.panels * pieces.blocks);  // part of a position
      const int64_t position = sum / parts, part = sum % parts;
      const int64_t column = panel * kPanel;
      multiply_piece(p, p.a + position * p.a_position,
                     p.b + position * p.b_position + column * p.b_column, p.depth * part / parts,
                     p.depth * (part + 1) / parts, p.rows * block / pieces.blocks,
                     p.rows * (block + 1) / pieces.blocks, min64(kPanel, p.columns - column), add,
                     sums + sum * size + column);
    }
  });
  if (parts == 1) return;
  for (int64_t i = 0; i < p.count; ++i) {
    sum_parts(sums + i * parts * size, parts, size, p.add, p.out + i * size);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
