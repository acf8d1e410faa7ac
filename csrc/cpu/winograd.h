// What the Winograd convolutions share: squares of vectors of channels, transformed in both
// dimensions, and where tiles lie in images.
#pragma once

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "stream.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have

// Columns first, then rows: load(k) is element k of a square, store(k, vector) takes one of the
// result.
template <class Transform, class V, class Load, class Store>
inline void transform_square(Load load, Store store) {
  constexpr int kFrom = Transform::kFrom, kTo = Transform::kTo;
  V between[kTo][kFrom];
  for (int j = 0; j < kFrom; ++j) {
    V column[kFrom], result[kTo];
    for (int i = 0; i < kFrom; ++i) column[i] = load(i * kFrom + j);
    Transform::apply(column, result);
    for (int i = 0; i < kTo; ++i) between[i][j] = result[i];
  }
  for (int i = 0; i < kTo; ++i) {
    V row[kTo];
    Transform::apply(between[i], row);
    for (int j = 0; j < kTo; ++j) store(i * kTo + j, row[j]);
  }
}

// The same of vectors of channels; `ahead` of every number read another one will be, soon.
template <class Transform, class V, class T, class Store>
inline void transform_lanes(const T* const* from, int64_t channel, int64_t ahead, Store store) {
  transform_square<Transform, V>(
      [&](int k) {
        __builtin_prefetch(from[k] + channel + ahead);
        return load_lanes<V>(from[k] + channel);
      },
      store);
}

// A square of vectors of channels to another one, of which store(k, channel, vector) takes a part.
template <class Transform, class Store>
void transform_each(const float* const* from, int64_t channels, int64_t ahead, Store store) {
  for_each_lanes<1>(channels, [&](auto lanes, int64_t channel) {
    using V = typename decltype(lanes)::V;
    transform_lanes<Transform, V>(from, channel, ahead, [&](int k, V v) { store(k, channel, v); });
  });
}

template <class Transform>
void transform(const float* const* from, int64_t channels, int64_t ahead, float* const* to) {
  transform_each<Transform>(from, channels, ahead, [=](int k, int64_t channel, auto v) {
    store_lanes(to[k] + channel, v);
  });
}

// parts[k]: part k of an array whose parts are `size` apart.
template <int COUNT, class T>
void split(T* array, int64_t size, T** parts) {
  for (int k = 0; k < COUNT; ++k) parts[k] = array + k * size;
}

// The upper left pixel of a tile and the image that has it; STEP: from a tile to the next.
template <int STEP>
struct TilePlace {
  int64_t image, top, left;
  TilePlace(const WinogradTiles& a, int64_t tile) {
    const int64_t columns = ceil_div(a.width, STEP), rows = ceil_div(a.height, STEP);
    image = tile / (columns * rows);
    top = tile / columns % rows * STEP;
    left = tile % columns * STEP;
  }
};

// The SIZE x SIZE pixels of a tile, `margin` above and left of its place; `outside` of the image.
template <int SIZE, int STEP, class T>
void split_tile(T* images, const WinogradTiles& a, int64_t tile, int64_t margin, T* outside,
                T** pixels) {
  const TilePlace<STEP> place(a, tile);
  T* image = images + place.image * a.height * a.width * a.channels;
  for (int64_t i = 0; i < SIZE; ++i) {
    const int64_t y = place.top - margin + i;
    const bool row_inside = y >= 0 && y < a.height;
    T* pixel = image + (y * a.width + place.left - margin) * a.channels;
    for (int64_t j = 0; j < SIZE; ++j, pixel += a.channels) {
      const int64_t x = place.left - margin + j;
      pixels[i * SIZE + j] = row_inside && x >= 0 && x < a.width ? pixel : outside;
    }
  }
}

// each(tile, how many tiles of `a` come before, a pixel of zeros for what is outside of the images)
template <class Each>
void for_each_tile(const WinogradTiles& a, int64_t positions, Each each) {
  const int64_t tile_size = positions * max64(1, a.channels);
  parallel_for(a.tile_end - a.tile, max64(1, kGrain / tile_size), [&](int64_t begin, int64_t end) {
    float* outside = static_cast<float*>(scratch(kLocalRows, a.channels * sizeof(float)));
    memset(outside, 0, a.channels * sizeof(float));
    for (int64_t t = begin; t < end; ++t) each(a.tile + t, t, outside);
    stream_fence();
  });
}

template <class Each>
void for_each_filter(const WinogradWeights& a, int64_t positions, Each each) {
  const int64_t filter_size = positions * max64(1, a.channels);
  parallel_for(a.filters, max64(1, kGrain / filter_size), [&](int64_t begin, int64_t end) {
    for (int64_t filter = begin; filter < end; ++filter) each(filter);
  });
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
