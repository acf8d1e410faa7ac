// Tiles of sums: u8 rows times expanded panels.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "functions.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kTileRows = 16;
constexpr int kLineBytes = 64;
constexpr int kWide = 2 * kPanelRows;  // outputs of a block
constexpr int kTallTiles = 4;
constexpr int64_t kTall = kTallTiles * kTileRows;  // most rows of a block

// The thread's tiles while it lives: 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights. `depth`: of
// a step, a multiple of 4 up to 64.
class TileConfig {
 public:
  explicit TileConfig(int64_t depth) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      const bool inputs = i == 4 || i == 5, weights = i >= 6;
      config.rows[i] = static_cast<uint8_t>(weights ? depth / kBlockDepth : kTileRows);
      config.row_bytes[i] = static_cast<uint16_t>(inputs ? depth : kLineBytes);
    }
    asm volatile("" : : "r"(&config) : "memory");  // gcc 12 does not know that it is read
    _tile_loadconfig(&config);
  }
  ~TileConfig() { _tile_release(); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

// Where the steps of a sum find their operands.
struct Steps {
  const int64_t* inputs;  // offsets from the row's start
  int64_t count;
  int64_t weight_bytes;  // of a step's tile
};

// The weights of a panel's steps, expanded before.
struct Expanded {
  const int8_t* panel;
  int64_t step_bytes;

  const int8_t* operator()(int64_t step) const { return panel + step * step_bytes; }
};

// sums, [2 * kTileRows][kWide]: that many rows, `stride` bytes apart, times two panels. Every tile
// is used twice. between() runs after each step: other work for the time that products take.
template <class Between>
inline __attribute__((always_inline)) void multiply_square(const Steps& steps, const uint8_t* rows,
                                                           int64_t stride, const Expanded& left,
                                                           const Expanded& right, int32_t* sums,
                                                           const Between& between) {
  constexpr int64_t kBytes = kWide * sizeof(int32_t);
  const uint8_t* below = rows + kTileRows * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps.count; ++i) {
    _tile_loadd(6, left(i), kLineBytes);
    _tile_loadd(4, rows + steps.inputs[i], stride);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, right(i), kLineBytes);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, below + steps.inputs[i], stride);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
    between();
  }
  _tile_stored(0, sums, kBytes);
  _tile_stored(1, sums + kPanelRows, kBytes);
  _tile_stored(2, sums + kTileRows * kWide, kBytes);
  _tile_stored(3, sums + kTileRows * kWide + kPanelRows, kBytes);
}

// sums, [TILES * kTileRows][kWide], of which one panel's: each of its weights is used TILES times
// in a row.
template <int TILES, class Weights, class Between>
inline __attribute__((always_inline)) void multiply_tall(const Steps& steps, const uint8_t* rows,
                                                         int64_t stride, Weights& weights,
                                                         int32_t* sums, const Between& between) {
  constexpr int64_t kBytes = kWide * sizeof(int32_t);
  const int64_t tile = kTileRows * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps.count; ++i) {
    const uint8_t* x = rows + steps.inputs[i];
    _tile_loadd(6, weights(i), kLineBytes);
    _tile_loadd(4, x, stride);
    _tile_dpbusd(0, 4, 6);
    if (TILES > 1) {
      _tile_loadd(5, x + tile, stride);
      _tile_dpbusd(1, 5, 6);
    }
    if (TILES > 2) {
      _tile_loadd(4, x + 2 * tile, stride);
      _tile_dpbusd(2, 4, 6);
    }
    if (TILES > 3) {
      _tile_loadd(5, x + 3 * tile, stride);
      _tile_dpbusd(3, 5, 6);
    }
    between();
  }
  _tile_stored(0, sums, kBytes);
  if (TILES > 1) _tile_stored(1, sums + kTileRows * kWide, kBytes);
  if (TILES > 2) _tile_stored(2, sums + 2 * kTileRows * kWide, kBytes);
  if (TILES > 3) _tile_stored(3, sums + 3 * kTileRows * kWide, kBytes);
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
