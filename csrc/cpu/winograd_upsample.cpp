// Passes of an up-sampling and a convolution by Winograd's algorithm, and of its gradients.

#include "winograd_upsample.h"
#include "sample_norm.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// The transpose of InputTransform.
struct InputGradientTransform {
  static constexpr int kFrom = kPoints, kTo = kPoints;
  template <class V>
  static void apply(const V* x, V* y) {
    const V e1 = x[1] - x[3], e2 = x[1] + x[3];
    const V d1 = (e1 + (2.0f * x[4] - 0.5f * x[5])) + (1.5f * x[0] - x[2]);
    const V d2 = (e2 + (x[4] + x[5])) + (x[0] + 1.5f * x[2]);
    y[0] = x[0];
    y[1] = -d1;
    y[2] = 1.5f * e1 - d2 - x[0];
    y[3] = d1 + 1.5f * e2 - x[2];
    y[4] = d2;
    y[5] = x[2];
  }
};

// The transpose of OutputTransform.
struct GradientTransform {
  static constexpr int kFrom = kOutputs, kTo = kProducts;
  template <class V>
  static void apply(const V* x, V* y) {
    V sums[2];
    for (int odd = 0; odd < 2; ++odd) {
      const V x0 = x[odd], x1 = x[2 + odd], x2 = x[4 + odd], x3 = x[6 + odd];
      const V even = x0 + x2, uneven = x1 + x3;
      sums[odd] = even + uneven;
      y[3 + odd] = even - uneven;
      y[5 + odd] = (x0 + 0.25f * x2) + (0.5f * x1 + 0.125f * x3);
      y[7 + odd] = (x0 + 4.0f * x2) - (2.0f * x1 + 8.0f * x3);
    }
    y[0] = x[0];
    y[1] = sums[0] + sums[1];
    y[2] = x[7];
  }
};

// The transpose of WeightTransform.
struct WeightGradientTransform {
  static constexpr int kFrom = kProducts, kTo = kTaps;
  template <class V>
  static void apply(const V* x, V* y) {
    const V one = kThird * x[1];
    const V minus_even = kThird * x[3], half_even = kHalf * x[5], two_even = kTwo * x[7];
    const V minus_odd = kThird * x[4], half_odd = kHalf * x[6], two_odd = kTwo * x[8];
    const V right = (minus_even + half_even) - 2.0f * two_even;
    const V left = (minus_odd + half_odd) - 2.0f * two_odd;
    y[0] = (x[0] + (one + left)) + (2.0f * half_even + (two_even - minus_even));
    y[1] = one + (left + right);
    y[2] = (x[2] + (one + right)) + (0.5f * half_odd + (4.0f * two_odd - minus_odd));
  }
};

// Positions [36, tiles, channels] of the tile with `t` before it.
template <class T>
void split_positions(T* all, const WinogradTiles& a, int64_t t, T** positions) {
  const int64_t size = (a.tile_end - a.tile) * a.channels;
  for (int i = 0; i < kPoints; ++i) {
    for (int j = 0; j < kPoints; ++j) {
      positions[i * kPoints + j] = all + position_of(i, j) * size + t * a.channels;
    }
  }
}

// A row of products [9, rows, channels], [18, rows, 2, channels] and [9, rows, 4, channels].
template <class T>
void split_products(T* all, int64_t rows, int64_t row, int64_t channels, T** products) {
  for (int k = 0; k < kProducts * kProducts; ++k) {
    const ProductPlace& p = kPlaces.places[k];
    products[k] = all + (p.first * rows + row * p.count + p.variant) * channels;
  }
}

}  // namespace

void winograd_upsample_input(const WinogradTiles& a) {
  for_each_tile(a, kPoints * kPoints, [&](int64_t tile, int64_t t, const float* zeros) {
    const float* pixels[kPoints * kPoints];
    float* positions[kPoints * kPoints];
    split_tile<kPoints, kStep>(a.from, a, tile, 1, zeros, pixels);
    split_positions(a.to, a, t, positions);
    transform<InputTransform>(pixels, a.channels, kStep * a.channels, positions);
  });
}

// finish(image, first channel of V): a function of V, applied to every output before it is stored.
template <class Finish>
void write_outputs(const WinogradTiles& a, Finish finish) {
  const int64_t row_bytes = a.channels * static_cast<int64_t>(sizeof(float));
  const bool stream = streams_rows(a.to, a.images * a.height * a.width * row_bytes, row_bytes);
  for_each_tile(a, kProducts * kProducts, [&](int64_t tile, int64_t t, float* unused) {
    const float* products[kProducts * kProducts];
    float* pixels[kOutputs * kOutputs];
    split_products(a.from, a.tile_end - a.tile, t, a.channels, products);
    split_tile<kOutputs, kOutputs>(a.to, a, tile, 0, unused, pixels);
    const int64_t image = TilePlace<kOutputs>(a, tile).image;
    const int64_t ahead = 4 * a.channels;  // in all matrices: a row has one, two or four products
    for_each_lanes<1>(a.channels, [&](auto lanes, int64_t c) {
      using V = typename decltype(lanes)::V;
      const auto finished = finish(V{}, image, c);
      if (stream) {
        transform_lanes<OutputTransform, V>(
            products, c, ahead, [&](int k, V v) { stream_lanes(pixels[k] + c, finished(v)); });
      } else {
        transform_lanes<OutputTransform, V>(
            products, c, ahead, [&](int k, V v) { store_lanes(pixels[k] + c, finished(v)); });
      }
    });
  });
}

void winograd_upsample_output(const WinogradTiles& a) {
  write_outputs(a, [](auto, int64_t, int64_t) { return [](auto v) { return v; }; });
}

void winograd_upsample_norm_output(const WinogradNormTiles& b) {
  write_outputs(b.tiles, [&](auto zero, int64_t image, int64_t c) {
    using V = decltype(zero);
    const Sample sample = sample_of(b.tables, b.tiles.channels, image);
    const auto channel = sample.template from<V>(c);
    return [channel](V v) { return channel.activation(channel.norm(channel.centered(v))); };
  });
}

void winograd_upsample_gradient(const WinogradGradientTiles& b) {
  const WinogradTiles& a = b.tiles;
  for_each_tile(a, kProducts * kProducts, [&](int64_t tile, int64_t t, const float* zeros) {
    const float* pixels[kOutputs * kOutputs];
    float* products[kProducts * kProducts];
    split_tile<kOutputs, kOutputs>(a.from, a, tile, 0, zeros, pixels);
    split_products(a.to, a.tile_end - a.tile, t, a.channels, products);
    transform<GradientTransform>(pixels, a.channels, kOutputs * a.channels, products);
    double* sums = b.sums + t * a.channels;
    memset(sums, 0, a.channels * sizeof(double));
    for (const float* pixel : pixels) {
#pragma GCC ivdep
      for (int64_t c = 0; c < a.channels; ++c) sums[c] += pixel[c];
    }
  });
}

// Adds lines [begin, end) of the pixels of tiles [first, last), counted in the group. The first
// tile to have a pixel writes it.
void add_input_gradient(const WinogradTiles& a, int64_t first, int64_t last, int begin, int end) {
  float* zeros = static_cast<float*>(scratch(kLocalRows, 2 * a.channels * sizeof(float)));
  float* unused = zeros + a.channels;
  memset(zeros, 0, a.channels * sizeof(float));
  for (int64_t t = first; t < last; ++t) {
    const float* positions[kPoints * kPoints];
    const float* before[kPoints * kPoints];
    float* pixels[kPoints * kPoints];
    split_positions(a.from, a, t, positions);
    split_tile<kPoints, kStep>(a.to, a, a.tile + t, 1, unused, pixels);
    const TilePlace<kStep> place(a, a.tile + t);
    for (int i = 0; i < kPoints; ++i) {
      for (int j = 0; j < kPoints; ++j) {
        const int k = i * kPoints + j;
        const bool written = i < (place.top ? 2 : 1) || j < (place.left ? 2 : 1);
        if (i < begin || i >= end) pixels[k] = unused;
        before[k] = written && pixels[k] != unused ? pixels[k] : zeros;
      }
    }
    transform_each<InputGradientTransform>(
        positions, a.channels, a.channels, [&](int k, int64_t c, auto v) {
          store_lanes(pixels[k] + c, load_lanes<decltype(v)>(before[k] + c) + v);
          __builtin_prefetch(pixels[k] + c + kStep * a.channels);
        });
  }
}

// Tiles overlap by two pixels: every thread takes some rows of tiles, and what they add to the rows
// above, another thread's, is added when that is done. So tiles add in their order.
void winograd_upsample_input_gradient(const WinogradTiles& a) {
  const int64_t columns = ceil_div(a.width, kStep);
  if (a.tile_end == a.tile) return;
  const int64_t first_row = a.tile / columns, rows = ceil_div(a.tile_end, columns) - first_row;
  const int64_t row_size = kPoints * kPoints * columns * max64(1, a.channels);
  const int64_t parts = min64(rows, min64(num_threads(), ceil_div(rows * row_size, kGrain)));
  // In the group, of a row counted over the images.
  auto tile_of = [&](int64_t row) {
    return min64(max64(row * columns, a.tile), a.tile_end) - a.tile;
  };
  auto row_of = [&](int64_t part) { return first_row + part * rows / parts; };
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = row_of(part);
      add_input_gradient(a, tile_of(row), tile_of(row + 1), part ? 2 : 0, kPoints);
      add_input_gradient(a, tile_of(row + 1), tile_of(row_of(part + 1)), 0, kPoints);
    }
  });
  parallel_for(parts - 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin + 1; part <= end; ++part) {
      const int64_t row = row_of(part);
      add_input_gradient(a, tile_of(row), tile_of(row + 1), 0, 2);
    }
  });
}

void winograd_upsample_weights(const WinogradWeights& a) {
  for_each_filter(a, kProducts * kProducts, [&](int64_t filter) {
    const float* taps[kTaps * kTaps];
    float* products[kProducts * kProducts];
    split<kTaps * kTaps>(a.from + filter * kTaps * kTaps * a.channels, a.channels, taps);
    split_products(a.to, a.filters, filter, a.channels, products);
    transform<WeightTransform>(taps, a.channels, 0, products);
  });
}

void winograd_upsample_weight_gradient(const WinogradWeights& a) {
  for_each_filter(a, kProducts * kProducts, [&](int64_t filter) {
    const float* products[kProducts * kProducts];
    float* taps[kTaps * kTaps];
    split_products(a.from, a.filters, filter, a.channels, products);
    split<kTaps * kTaps>(a.to + filter * kTaps * kTaps * a.channels, a.channels, taps);
    transform<WeightGradientTransform>(products, a.channels, 0, taps);
  });
}

}  // namespace FDDA_ISA
}  // namespace fdda
