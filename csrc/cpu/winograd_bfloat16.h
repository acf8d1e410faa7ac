// Winograd's algorithms on bfloat16: transforms in float32, what they make rounded to bfloat16,
// products of matrices with sums in float32.
//
// Two neighbours of a sum are multiplied at a time (vdpbf16ps): "pairs" are those two numbers, of
// two channels or of two tiles. Channels come in panels of kPanel, a multiple of which their number
// is. Sums have a panel's even channels first, then its odd ones: the halves of a Pair.
#pragma once

#include "pairs.h"
#include "row_tiles.h"
#include "transpose.h"
#include "winograd.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kPanel = 2 * kVectorLanes;
#if defined(__AVX512F__)
constexpr int kRows = 12;  // 12 * 2 sums, 2 vectors of the panel
#else
constexpr int kRows = 4;
#endif
// Pairs of tiles that a gradient of filters adds up in registers.
constexpr int64_t kTilePairs = 64;
constexpr int kAhead = 4;  // tiles from that in work to that asked for from memory
constexpr int kTaps = 3;

// F(2, 3), at the points 0, 1, -1 and infinity. All factors are 1, -1 and 1/2, so that roundings
// stay small, which they do not with more outputs.
constexpr int kPoints = 4, kOutputs = 2;

struct F2Input {
  static constexpr int kFrom = kPoints, kTo = kPoints;
  template <class V>
  static void apply(const V* x, V* y) {
    y[0] = x[0] - x[2];
    y[1] = x[1] + x[2];
    y[2] = x[2] - x[1];
    y[3] = x[1] - x[3];
  }
};

struct F2Output {
  static constexpr int kFrom = kPoints, kTo = kOutputs;
  template <class V>
  static void apply(const V* x, V* y) {
    y[0] = x[0] + (x[1] + x[2]);
    y[1] = (x[1] - x[2]) - x[3];
  }
};

WinogradTiles tiles_of(const Conv3x3Shape& s, int64_t channels, int64_t scale) {
  const int64_t tiles = s.images * ceil_div(s.height, kOutputs) * ceil_div(s.width, kOutputs);
  return {s.images, scale * s.height, scale * s.width, channels, 0, tiles, nullptr, nullptr};
}

// to[i] = the pair of even[i] and odd[i]
inline void store_pairs(uint32_t* to, Vector even, Vector odd) {
  store_lanes(reinterpret_cast<BFloat16*>(to), Pair{even, odd});
}

// out[r, n] = sum over k of a[r, k] * panel[k, n], pairs; or added to it.
template <int ROWS>
void multiply(const uint32_t* a, int64_t a_row, int64_t a_depth, const uint32_t* panel,
              int64_t depth, bool add, float* out) {
  Vector sum[ROWS][2] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_depth, panel += kPanel) {
    const Bits b[2] = {load_pairs(panel), load_pairs(panel + kVectorLanes)};
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < 2; ++v) sum[r][v] = add_dot(a[r * a_row], b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < 2; ++v) {
      float* to = out + r * kPanel + v * kVectorLanes;
      store_lanes(to, add ? load_lanes<Vector>(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// Filters [outputs, 3, 3, inputs] to [panels of outputs][filters][pairs of inputs][kPanel].
template <class Transform, class T>
void filters_by_outputs(const T* weight, int64_t inputs, int64_t outputs, uint32_t* to) {
  constexpr int kFilters = Transform::kTo * Transform::kTo;
  const int64_t depth = inputs / 2;
  parallel_for(outputs / kVectorLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t half = begin; half < end; ++half) {
      uint32_t* panel = to + half / 2 * (kFilters * depth * kPanel) + half % 2 * kVectorLanes;
      for (int64_t c = 0; c < inputs; c += kPanel) {
        Vector pairs[kFilters][kVectorLanes];
        for (int lane = 0; lane < kVectorLanes; ++lane) {
          const int64_t output = half / 2 * kPanel + 2 * lane + half % 2;
          const T* taps[kTaps * kTaps];
          split<kTaps * kTaps>(weight + output * kTaps * kTaps * inputs, inputs, taps);
          transform_lanes<Transform, Pair>(taps, c, 0, [&](int k, Pair v) {
            store_lanes(reinterpret_cast<BFloat16*>(&pairs[k][lane]), v);
          });
        }
        for (int k = 0; k < kFilters; ++k) {
          transpose<1>(pairs[k]);
          for (int i = 0; i < kVectorLanes; ++i) {
            memcpy(panel + (k * depth + c / 2 + i) * kPanel, &pairs[k][i], sizeof(Vector));
          }
        }
      }
    }
  });
}

// The same filters, rotated by half a turn, for the gradient with respect to the inputs: to [panels
// of inputs][filters][pairs of outputs][kPanel].
template <class Transform, class T>
void filters_by_inputs(const T* weight, int64_t inputs, int64_t outputs, uint32_t* to) {
  constexpr int kFilters = Transform::kTo * Transform::kTo;
  const int64_t depth = outputs / 2, size = kTaps * kTaps * inputs;
  parallel_for(depth, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const T *first[kTaps * kTaps], *second[kTaps * kTaps];
      split<kTaps * kTaps>(weight + (2 * pair + 1) * size - inputs, -inputs, first);
      split<kTaps * kTaps>(weight + (2 * pair + 2) * size - inputs, -inputs, second);
      for (int64_t c = 0; c < inputs; c += kPanel) {
        uint32_t* panel = to + c * kFilters * depth + pair * kPanel;
        Pair values[kFilters];
        transform_lanes<Transform, Pair>(first, c, 0, [&](int k, Pair v) { values[k] = v; });
        transform_lanes<Transform, Pair>(second, c, 0, [&](int k, Pair v) {
          store_pairs(panel + k * depth * kPanel, values[k].even, v.even);
          store_pairs(panel + k * depth * kPanel + kVectorLanes, values[k].odd, v.odd);
        });
      }
    }
  });
}

// Filters as the products read them, in memory of this thread.
template <class Transform, class T>
const uint32_t* filters_of(const WinogradBFloat16& a) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t inputs = a.shape.inputs, outputs = a.shape.outputs;
  const int64_t size = Transform::kTo * Transform::kTo * inputs * outputs / 2;
  uint32_t* filters = static_cast<uint32_t*>(scratch(kSharedWeights, size * sizeof(uint32_t)));
  if (a.rotated) {
    filters_by_inputs<Transform>(weight, outputs, inputs, filters);
  } else {
    filters_by_outputs<Transform>(weight, inputs, outputs, filters);
  }
  return filters;
}

template <class Transform>
const uint32_t* transform_filters(const WinogradBFloat16& a) {
  const bool wide = a.weight_dtype == Dtype::kFloat32;
  return wide ? filters_of<Transform, float>(a) : filters_of<Transform, BFloat16>(a);
}

// A panel of 2 * kVectorLanes sums.
inline Pair load_panel(const float* from) {
  return {load_lanes<Vector>(from), load_lanes<Vector>(from + kVectorLanes)};
}

// Tiles [tile, tile + count) to [values][kRows][channels].
template <class Transform, int STEP>
void tiles_to_values(const BFloat16* images, const WinogradTiles& a, int64_t tile, int64_t count,
                     const BFloat16* zeros, BFloat16* to) {
  constexpr int kFrom = Transform::kFrom;
  for (int64_t t = 0; t < count; ++t, to += a.channels) {
    const BFloat16* pixels[kFrom * kFrom];
    split_tile<kFrom, STEP>(images, a, tile + t, 1, zeros, pixels);
    for (int64_t c = 0; c < a.channels; c += kPanel) {
      transform_lanes<Transform, Pair>(pixels, c, kAhead * STEP * a.channels, [&](int k, Pair v) {
        store_lanes(to + k * kRows * a.channels + c, v);
      });
    }
  }
}

// A panel of channels of the same tiles, of [sums][kRows][kPanel], plus `bias`.
template <class Transform>
void sums_to_tiles(const float* from, const WinogradTiles& a, int64_t tile, int64_t count,
                   bool stream, Pair bias, BFloat16* images) {
  constexpr int kTo = Transform::kTo;
  alignas(64) BFloat16 unused[kPanel];
  for (int64_t t = 0; t < count; ++t, from += kPanel) {
    BFloat16* pixels[kTo * kTo];
    split_tile<kTo, kTo>(images, a, tile + t, 0, unused, pixels);
    Vector even[kTo * kTo];  // one half after the other: few registers are enough
    transform_square<Transform, Vector>(
        [&](int k) { return load_lanes<Vector>(from + k * kRows * kPanel); },
        [&](int k, Vector v) { even[k] = v + bias.even; });
    transform_square<Transform, Vector>(
        [&](int k) { return load_lanes<Vector>(from + k * kRows * kPanel + kVectorLanes); },
        [&](int k, Vector v) { write_lanes(stream, pixels[k], Pair{even[k], v + bias.odd}); });
  }
}

// The tiles of x become those of y. Form: InputTransform with kInputStep pixels from tile to tile,
// which makes values; kFilters products, of value(k) with filter k, add up to sum(k), the first of
// them where !adds(k); OutputTransform, which makes tiles of sums.
template <class Form>
void convolve(const WinogradBFloat16& a, const WinogradTiles& x, const WinogradTiles& y) {
  using Input = typename Form::InputTransform;
  using Output = typename Form::OutputTransform;
  constexpr int64_t kValues = Input::kTo * Input::kTo;
  constexpr int64_t kProducts = Output::kFrom * Output::kFrom * kRows * kPanel;
  const BFloat16* from = static_cast<const BFloat16*>(a.x);
  BFloat16* to = static_cast<BFloat16*>(a.y);
  const uint32_t* filters = transform_filters<typename Form::WeightTransform>(a);
  const int64_t inputs = x.channels, outputs = y.channels, depth = inputs / 2;
  const int64_t pixel_bytes = outputs * static_cast<int64_t>(sizeof(BFloat16));
  const bool stream = streams_rows(to, y.images * y.height * y.width * pixel_bytes, pixel_bytes);
  parallel_for(ceil_div(x.tile_end, kRows), 1, [&](int64_t begin, int64_t end) {
    const size_t bytes = (kValues * kRows + 1) * inputs * sizeof(BFloat16);
    float* products = static_cast<float*>(scratch(kLocalRows, kProducts * sizeof(float) + bytes));
    BFloat16* zeros = reinterpret_cast<BFloat16*>(products + kProducts);
    BFloat16* values = zeros + inputs;
    memset(zeros, 0, bytes);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kRows, count = min64(kRows, x.tile_end - first);
      tiles_to_values<Input, Form::kInputStep>(from, x, first, count, zeros, values);
      const uint32_t* filter = filters;
      for (int64_t n = 0; n < outputs; n += kPanel) {
        for (int k = 0; k < Form::kFilters; ++k, filter += depth * kPanel) {
          const BFloat16* value = values + Form::value(k) * kRows * inputs;
          multiply<kRows>(reinterpret_cast<const uint32_t*>(value), depth, 1, filter, depth,
                          Form::adds(k), products + Form::sum(k) * kRows * kPanel);
        }
        const Pair bias = a.bias ? load_lanes<Pair>(a.bias + n) : Pair{};
        sums_to_tiles<Output>(products, y, first, count, stream, bias, to + n);
      }
    }
    stream_fence();
  });
}

// Of a panel of pairs of tiles: parts that are powers of two apart would share a set of the cache.
inline int64_t rows_of(int64_t pairs) { return pairs + 1; }

// The even or the odd channels of a panel.
template <class Transform, int ODD>
void half_to_pairs(const BFloat16* const* first, const BFloat16* const* second, int64_t channel,
                   int64_t ahead, uint32_t* to, int64_t size) {
  const auto half_of = [=](const BFloat16* pixel) {
    if (ODD == 0) __builtin_prefetch(pixel + channel + ahead);
    const Bits both = load_pairs(reinterpret_cast<const uint32_t*>(pixel + channel));
    return BFloat16::value<Vector>(ODD ? both >> 16 : both & 0xffffu);
  };
  Vector values[Transform::kTo * Transform::kTo];
  transform_square<Transform, Vector>([&](int k) { return half_of(first[k]); },
                                      [&](int k, Vector v) { values[k] = v; });
  transform_square<Transform, Vector>(
      [&](int k) { return half_of(second[k]); },
      [&](int k, Vector v) { store_pairs(to + k * size, values[k], v); });
}

// The sums of the pixels of two tiles, a panel of channels.
template <int PIXELS>
void add_up(const BFloat16* const* first, const BFloat16* const* second, int64_t channel,
            float* sums) {
  Pair sum{};
  for (int k = 0; k < PIXELS; ++k) {
    sum = sum + (load_lanes<Pair>(first[k] + channel) + load_lanes<Pair>(second[k] + channel));
  }
  store_lanes(sums + channel, sum);
}

// Tiles 2 * pair and the next of them, for `count` pairs from `first` on: to [values][panels of
// channels][rows_of(count)][kPanel], zeros for a tile that there is not. sums, if any:
// [pairs][channels], of the pixels.
template <class Transform, int STEP>
void tiles_to_pairs(const BFloat16* images, const WinogradTiles& a, int64_t margin, int64_t first,
                    int64_t count, uint32_t* to, float* sums) {
  constexpr int kPixels = Transform::kFrom * Transform::kFrom;
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    BFloat16* zeros = static_cast<BFloat16*>(scratch(kLocalRows, a.channels * sizeof(BFloat16)));
    memset(zeros, 0, a.channels * sizeof(BFloat16));
    for (int64_t pair = begin; pair < end; ++pair) {
      const BFloat16 *even[kPixels], *odd[kPixels];
      const int64_t tile = 2 * (first + pair);
      split_tile<Transform::kFrom, STEP, const BFloat16>(images, a, tile, margin, zeros, even);
      split<kPixels, const BFloat16>(zeros, 0, odd);
      if (tile + 1 < a.tile_end) {
        split_tile<Transform::kFrom, STEP, const BFloat16>(images, a, tile + 1, margin, zeros, odd);
      }
      for (int64_t c = 0; c < a.channels; c += kPanel) {
        uint32_t* panel = to + c * rows_of(count) + pair * kPanel;
        half_to_pairs<Transform, 0>(even, odd, c, kAhead * STEP * a.channels, panel,
                                    rows_of(count) * a.channels);
        half_to_pairs<Transform, 1>(even, odd, c, 0, panel + kVectorLanes,
                                    rows_of(count) * a.channels);
        if (sums) add_up<kPixels>(even, odd, c, sums + pair * a.channels);
      }
    }
  });
}

// The gradient of filters [outputs, 3, 3, inputs]. Form: InputTransform of x as above and
// GradientTransform of grad_y, which makes one value for each of kFilters; WeightGradientTransform.
// grad_bias, if any, is added to.
// Sums are [filters][panels of outputs][panels of inputs][kPanel outputs][kPanel inputs].
template <class Form>
void filter_gradient(const WinogradBFloat16Gradient& a, const WinogradTiles& x,
                     const WinogradTiles& y) {
  using Input = typename Form::InputTransform;
  using Gradient = typename Form::GradientTransform;
  constexpr int64_t kValues = Input::kTo * Input::kTo;
  const int64_t pairs = ceil_div(x.tile_end, 2);
  const int64_t size = Form::kFilters * x.channels * y.channels;
  float* total = static_cast<float*>(scratch(kSums, size * sizeof(float)));
  if (pairs == 0) memset(total, 0, size * sizeof(float));
  const int64_t values_size = kValues * rows_of(kTilePairs) * x.channels;
  const int64_t grads_size = Form::kFilters * rows_of(kTilePairs) * y.channels;
  uint32_t* values = static_cast<uint32_t*>(scratch(
      kSharedRows, (values_size + grads_size + kTilePairs * y.channels) * sizeof(uint32_t)));
  uint32_t* grads = values + values_size;
  float* sums = a.grad_bias ? reinterpret_cast<float*>(grads + grads_size) : nullptr;
  const int64_t outputs = y.channels / kPanel, inputs = x.channels / kPanel;
  for (int64_t first = 0; first < pairs; first += kTilePairs) {
    const int64_t count = min64(kTilePairs, pairs - first);
    tiles_to_pairs<Input, Form::kInputStep>(static_cast<const BFloat16*>(a.x), x, 1, first, count,
                                            values, nullptr);
    tiles_to_pairs<Gradient, Gradient::kFrom>(static_cast<const BFloat16*>(a.grad_y), y, 0, first,
                                              count, grads, sums);
    for (int64_t i = 0; a.grad_bias && i < count; ++i) {
      for (int64_t n = 0; n < y.channels; ++n) a.grad_bias[n] += sums[i * y.channels + n];
    }
    parallel_for(Form::kFilters * outputs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t value = Form::value(static_cast<int>(t / outputs));
        for (int64_t i = 0; i < inputs; ++i) {
          const uint32_t* panel = values + (value * inputs + i) * rows_of(count) * kPanel;
          float* out = total + (t * inputs + i) * kPanel * kPanel;
          for_each_row_tile<kRows>(kPanel, [&](auto rows, int64_t row) {
            multiply<decltype(rows)::kCount>(grads + t * rows_of(count) * kPanel + row, 1, kPanel,
                                             panel, count, first > 0, out + row * kPanel);
          });
        }
      }
    });
  }
  parallel_for(y.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = n % kPanel / 2 + n % 2 * kVectorLanes;
      for (int64_t i = 0; i < inputs; ++i) {
        const float* part = total + ((n / kPanel * inputs + i) * kPanel + row) * kPanel;
        float* taps = a.grad_weight + n * kTaps * kTaps * x.channels + i * kPanel;
        transform_square<typename Form::WeightGradientTransform, Pair>(
            [&](int k) { return load_panel(part + k * x.channels * y.channels); },
            [&](int k, Pair v) { store_lanes(taps + k * x.channels, v); });
      }
    }
  });
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
