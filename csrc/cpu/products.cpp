// Batched products of float32 matrices. A panel of b is packed into the first-level cache and met
// by all rows of a, which are read where they are.

#include "parallel.h"
#include "register_panel.h"
#include "transpose.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kDepth = 256;      // of a panel
constexpr int64_t kGrain = 1 << 20;  // multiply-adds a thread should have

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

}  // namespace

void products(const Products& p) {
  const int64_t panels = ceil_div(p.columns, kPanel);
  const int64_t grain = max64(1, kGrain / max64(1, p.rows * p.depth * kPanel));
  parallel_for(p.count * panels, grain, [&](int64_t begin, int64_t end) {
    float* panel = static_cast<float*>(scratch(kLocalWeights, kDepth * kPanel * sizeof(float)));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t position = t / panels, first = t % panels * kPanel;
      const int64_t columns = min64(kPanel, p.columns - first);
      const float* a = p.a + position * p.a_position;
      const float* b = p.b + position * p.b_position + first * p.b_column;
      float* out = p.out + position * p.rows * p.columns + first;
      int64_t k = 0;
      do {
        const int64_t depth = min64(kDepth, p.depth - k);
        pack(p, b + k * p.b_depth, depth, columns, panel);
        for_each_row_tile<kRows>(p.rows, [&](auto rows, int64_t row) {
          multiply<decltype(rows)::kCount>(p, a + row * p.a_row + k * p.a_depth, depth, panel,
                                           p.add || k > 0, columns, out + row * p.columns);
        });
        k += kDepth;
      } while (k < p.depth);
    }
  });
}

}  // namespace FDDA_ISA
}  // namespace fdda
