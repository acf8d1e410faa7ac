// Register tiles of a run-time height.
#pragma once

#include "functions.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

template <int ROWS>
struct Rows {
  static constexpr int kCount = ROWS;
};

// body(Rows<n>) for a run-time n of 1 to ROWS.
template <int ROWS, class Body>
void with_rows(int64_t rows, Body body) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) {
      body(Rows<ROWS>());
    } else {
      with_rows<ROWS - 1>(rows, body);
    }
  }
}

// body(Rows<n>, first) for `count` rows in tiles of at most ROWS, all of even height: no nearly
// empty last one.
template <int ROWS, class Body>
void for_each_row_tile(int64_t count, Body body) {
  const int64_t tiles = ceil_div(count, ROWS);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = i * count / tiles;
    with_rows<ROWS>((i + 1) * count / tiles - first, [&](auto rows) { body(rows, first); });
  }
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
