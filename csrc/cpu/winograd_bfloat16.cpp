// 3x3 convolutions in bfloat16 by Winograd's F(2x2, 3x3): 4 outputs by 16 products, not 36.
//
// Tiles of 4 x 4 pixels and the filters are transformed in float32 and rounded to bfloat16; at
// every one of the 16 positions a matrix product over the channels, its sums in float32, makes the
// transform of 2 x 2 outputs. All factors are 1, -1 and 1/2, so that roundings stay small, which
// they do not with F(4x4, 3x3). Two neighbours of a sum are multiplied at a time (vdpbf16ps):
// "pairs" are those two numbers. Channels are a multiple of kChannels.

#include "functions.h"
#include "parallel.h"
#include "row_tiles.h"
#include "transpose.h"
#include "vectors.h"
#include "winograd.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kPoints = 4, kOutputs = 2, kTaps = 3, kPositions = kPoints * kPoints;
constexpr int64_t kPanel = 2 * kVectorLanes;  // columns of a product
#if defined(__AVX512F__)
constexpr int kRows = 12;  // 12 * 2 sums, 2 vectors of the panel
#else
constexpr int kRows = 4;
#endif
// Pairs of tiles that the gradient of the filters adds up in registers.
constexpr int64_t kGroupPairs = 64;

struct InputTransform {
  static constexpr int kFrom = kPoints, kTo = kPoints;
  template <class V>
  static void apply(const V* x, V* y) {
    y[0] = x[0] - x[2];
    y[1] = x[1] + x[2];
    y[2] = x[2] - x[1];
    y[3] = x[1] - x[3];
  }
};

struct OutputTransform {
  static constexpr int kFrom = kPoints, kTo = kOutputs;
  template <class V>
  static void apply(const V* x, V* y) {
    y[0] = x[0] + (x[1] + x[2]);
    y[1] = (x[1] - x[2]) - x[3];
  }
};

// The transpose of OutputTransform.
struct GradientTransform {
  static constexpr int kFrom = kOutputs, kTo = kPoints;
  template <class V>
  static void apply(const V* x, V* y) {
    y[0] = x[0];
    y[1] = x[0] + x[1];
    y[2] = x[0] - x[1];
    y[3] = V{} - x[1];
  }
};

struct WeightTransform {
  static constexpr int kFrom = kTaps, kTo = kPoints;
  template <class V>
  static void apply(const V* x, V* y) {
    const V even = 0.5f * (x[0] + x[2]), odd = 0.5f * x[1];
    y[0] = x[0];
    y[1] = even + odd;
    y[2] = even - odd;
    y[3] = x[2];
  }
};

// The transpose of WeightTransform.
struct WeightGradientTransform {
  static constexpr int kFrom = kPoints, kTo = kTaps;
  template <class V>
  static void apply(const V* x, V* y) {
    const V even = 0.5f * (x[1] + x[2]);
    y[0] = x[0] + even;
    y[1] = 0.5f * (x[1] - x[2]);
    y[2] = even + x[3];
  }
};

inline Bits load_pairs(const uint32_t* from) {
  Bits pairs;
  memcpy(&pairs, from, sizeof pairs);
  return pairs;
}

// sum + the products of the first and of the second numbers of pairs.
inline Vector add_dot(uint32_t a, Bits b, Vector sum) {
#if defined(__AVX512BF16__)
  return bits_as<Vector>(_mm512_dpbf16_ps(
      bits_as<__m512>(sum), bits_as<__m512bh>(_mm512_set1_epi32(a)), bits_as<__m512bh>(b)));
#else
  const float first = bits_as<float>(a << 16), second = bits_as<float>(a & 0xffff0000u);
  return sum + first * bits_as<Vector>(b << 16) + second * bits_as<Vector>(b & 0xffff0000u);
#endif
}

// out[r, n] = sum over k of a[r, k] * panel[k, n], pairs; out has kPanel columns.
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

int64_t tiles_in(const Conv3x3Shape& s) {
  return s.images * ceil_div(s.height, kOutputs) * ceil_div(s.width, kOutputs);
}

WinogradTiles images_of(const Conv3x3Shape& s, int64_t channels) {
  return {s.images, s.height, s.width, channels, 0, tiles_in(s), nullptr, nullptr};
}

// Filters to [panels of outputs][positions][pairs of inputs][kPanel].
template <class T>
void filters_by_outputs(const T* weight, int64_t inputs, int64_t outputs, uint32_t* to) {
  parallel_for(outputs / kVectorLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      uint32_t* panel =
          to + block / 2 * (kPositions * inputs / 2 * kPanel) + block % 2 * kVectorLanes;
      for (int64_t c = 0; c < inputs; c += 2 * kVectorLanes) {
        Vector pairs[kPositions][kVectorLanes];
        for (int n = 0; n < kVectorLanes; ++n) {
          const T* taps[kTaps * kTaps];
          split<kTaps * kTaps>(weight + (block * kVectorLanes + n) * kTaps * kTaps * inputs, inputs,
                               taps);
          transform_lanes<WeightTransform, Pair>(taps, c, 0, [&](int k, Pair v) {
            store_lanes(reinterpret_cast<BFloat16*>(&pairs[k][n]), v);
          });
        }
        for (int k = 0; k < kPositions; ++k) {
          transpose<1>(pairs[k]);
          for (int i = 0; i < kVectorLanes; ++i) {
            memcpy(panel + (k * inputs / 2 + c / 2 + i) * kPanel, &pairs[k][i], sizeof(Vector));
          }
        }
      }
    }
  });
}

// Rotated by half a turn, a sum over the outputs: to [panels of inputs][positions][pairs of
// outputs][kPanel].
template <class T>
void filters_by_inputs(const T* weight, int64_t inputs, int64_t outputs, uint32_t* to) {
  parallel_for(outputs / 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const T *first[kTaps * kTaps], *second[kTaps * kTaps];
      const int64_t size = kTaps * kTaps * inputs;
      split<kTaps * kTaps>(weight + (2 * pair + 1) * size - inputs, -inputs, first);
      split<kTaps * kTaps>(weight + (2 * pair + 2) * size - inputs, -inputs, second);
      for (int64_t c = 0; c < inputs; c += kVectorLanes) {
        uint32_t* panel = to + (c / kPanel * kPositions * outputs / 2 + pair) * kPanel + c % kPanel;
        Vector values[kPositions];
        transform_lanes<WeightTransform, Vector>(first, c, 0,
                                                 [&](int k, Vector v) { values[k] = v; });
        transform_lanes<WeightTransform, Vector>(second, c, 0, [&](int k, Vector v) {
          store_lanes(reinterpret_cast<BFloat16*>(panel + k * outputs / 2 * kPanel),
                      Pair{values[k], v});
        });
      }
    }
  });
}

template <class T>
void transform_filters(const WinogradBFloat16& a, uint32_t* to) {
  const T* weight = static_cast<const T*>(a.weight);
  if (a.rotated) {
    filters_by_inputs(weight, a.shape.outputs, a.shape.inputs, to);
  } else {
    filters_by_outputs(weight, a.shape.inputs, a.shape.outputs, to);
  }
}

// Tiles [tile, tile + count) to [positions][kRows][channels].
void tiles_to_positions(const BFloat16* images, const WinogradTiles& a, int64_t tile, int64_t count,
                        const BFloat16* zeros, BFloat16* to) {
  for (int64_t t = 0; t < count; ++t, to += a.channels) {
    const BFloat16* pixels[kPositions];
    split_tile<kPoints, kOutputs>(images, a, tile + t, 1, zeros, pixels);
    for (int64_t c = 0; c < a.channels; c += kPanel) {
      transform_lanes<InputTransform, Pair>(pixels, c, kOutputs * a.channels, [&](int k, Pair v) {
        store_lanes(to + k * kRows * a.channels + c, v);
      });
    }
  }
}

// kPanel channels of the same tiles, of [positions][kRows][kPanel].
void positions_to_tiles(const float* from, const WinogradTiles& a, int64_t tile, int64_t count,
                        BFloat16* images) {
  BFloat16 unused[kPanel];
  for (int64_t t = 0; t < count; ++t) {
    const float* positions[kPositions];
    BFloat16* pixels[kOutputs * kOutputs];
    split<kPositions, const float>(from + t * kPanel, kRows * kPanel, positions);
    split_tile<kOutputs, kOutputs>(images, a, tile + t, 0, unused, pixels);
    for (int64_t c = 0; c < kPanel; c += kVectorLanes) {
      transform_lanes<OutputTransform, Vector>(
          positions, c, 0, [&](int k, Vector v) { store_lanes(pixels[k] + c, v); });
    }
  }
}

}  // namespace

void winograd_bfloat16(const WinogradBFloat16& a) {
  const int64_t inputs = a.shape.inputs, outputs = a.shape.outputs, depth = inputs / 2;
  const WinogradTiles x = images_of(a.shape, inputs), y = images_of(a.shape, outputs);
  uint32_t* filters = static_cast<uint32_t*>(
      scratch(kSharedWeights, kPositions * depth * outputs * sizeof(uint32_t)));
  if (a.weight_dtype == Dtype::kFloat32) {
    transform_filters<float>(a, filters);
  } else {
    transform_filters<BFloat16>(a, filters);
  }
  parallel_for(ceil_div(x.tile_end, kRows), 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t kProducts = kPositions * kRows * kPanel;
    const size_t bytes = (kPositions * kRows + 1) * inputs * sizeof(BFloat16);
    float* products = static_cast<float*>(scratch(kLocalRows, kProducts * sizeof(float) + bytes));
    BFloat16* zeros = reinterpret_cast<BFloat16*>(products + kProducts);
    BFloat16* values = zeros + inputs;
    memset(zeros, 0, bytes);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kRows, count = min64(kRows, x.tile_end - first);
      tiles_to_positions(static_cast<const BFloat16*>(a.x), x, first, count, zeros, values);
      for (int64_t n = 0; n < outputs; n += kPanel) {
        for (int64_t k = 0; k < kPositions; ++k) {
          multiply<kRows>(reinterpret_cast<const uint32_t*>(values + k * kRows * inputs), depth, 1,
                          filters + (n * kPositions + k * kPanel) * depth, depth, false,
                          products + k * kRows * kPanel);
        }
        positions_to_tiles(products, y, first, count, static_cast<BFloat16*>(a.y) + n);
      }
    }
  });
}

namespace {

// Pairs of tiles: to [positions][panels of channels][pairs][kPanel]; a tile that there is not:
// zeros.
template <class Transform>
void pairs_of_tiles(const BFloat16* images, const WinogradTiles& a, int64_t margin, int64_t first,
                    int64_t count, uint32_t* to) {
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    BFloat16* zeros = static_cast<BFloat16*>(scratch(kLocalRows, a.channels * sizeof(BFloat16)));
    memset(zeros, 0, a.channels * sizeof(BFloat16));
    for (int64_t pair = begin; pair < end; ++pair) {
      constexpr int kPixels = Transform::kFrom * Transform::kFrom;
      const BFloat16 *even[kPixels], *odd[kPixels];
      const int64_t tile = 2 * (first + pair);
      split_tile<Transform::kFrom, kOutputs, const BFloat16>(images, a, tile, margin, zeros, even);
      if (tile + 1 < a.tile_end) {
        split_tile<Transform::kFrom, kOutputs, const BFloat16>(images, a, tile + 1, margin, zeros,
                                                               odd);
      } else {
        split<kPixels, const BFloat16>(zeros, 0, odd);
      }
      for (int64_t c = 0; c < a.channels; c += kVectorLanes) {
        uint32_t* panel = to + (c / kPanel * count + pair) * kPanel + c % kPanel;
        Vector values[kPositions];
        transform_lanes<Transform, Vector>(even, c, 0, [&](int k, Vector v) { values[k] = v; });
        transform_lanes<Transform, Vector>(odd, c, 0, [&](int k, Vector v) {
          store_lanes(reinterpret_cast<BFloat16*>(panel + k * count * a.channels),
                      Pair{values[k], v});
        });
      }
    }
  });
}

void write_gradient(const WinogradBFloat16Gradient& a, const float* total) {
  const int64_t inputs = a.shape.inputs, panels = inputs / kPanel;
  parallel_for(a.shape.outputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float* taps[kTaps * kTaps];
      split<kTaps * kTaps>(a.grad_weight + n * kTaps * kTaps * inputs, inputs, taps);
      for (int64_t c = 0; c < inputs; c += kPanel) {
        const float* positions[kPositions];
        const float* block =
            total + ((n / kPanel * panels + c / kPanel) * kPanel + n % kPanel) * kPanel;
        split<kPositions>(block, a.shape.outputs * inputs, positions);
        for (int64_t i = 0; i < kPanel; i += kVectorLanes) {
          transform_lanes<WeightGradientTransform, Vector>(
              positions, i, 0, [&](int k, Vector v) { store_lanes(taps[k] + c + i, v); });
        }
      }
    }
  });
}

}  // namespace

// Sums [positions][panels of outputs][panels of inputs][kPanel outputs][kPanel inputs].
void winograd_bfloat16_gradient(const WinogradBFloat16Gradient& a) {
  const WinogradTiles x = images_of(a.shape, a.shape.inputs),
                      y = images_of(a.shape, a.shape.outputs);
  const int64_t pairs = ceil_div(tiles_in(a.shape), 2);
  const int64_t size = kPositions * a.shape.inputs * a.shape.outputs;
  float* total = static_cast<float*>(scratch(kSums, size * sizeof(float)));
  if (pairs == 0) memset(total, 0, size * sizeof(float));
  uint32_t* values = static_cast<uint32_t*>(
      scratch(kSharedRows,
              kPositions * kGroupPairs * (a.shape.inputs + a.shape.outputs) * sizeof(uint32_t)));
  uint32_t* grads = values + kPositions * kGroupPairs * a.shape.inputs;
  for (int64_t first = 0; first < pairs; first += kGroupPairs) {
    const int64_t count = min64(kGroupPairs, pairs - first);
    pairs_of_tiles<InputTransform>(static_cast<const BFloat16*>(a.x), x, 1, first, count, values);
    pairs_of_tiles<GradientTransform>(static_cast<const BFloat16*>(a.grad_y), y, 0, first, count,
                                      grads);
    const int64_t outputs = a.shape.outputs / kPanel, inputs = a.shape.inputs / kPanel;
    parallel_for(kPositions * outputs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t i = 0; i < inputs; ++i) {
          const uint32_t* panel = values + (t / outputs * inputs + i) * count * kPanel;
          float* sums = total + (t * inputs + i) * kPanel * kPanel;
          for_each_row_tile<kRows>(kPanel, [&](auto rows, int64_t row) {
            multiply<decltype(rows)::kCount>(grads + t * count * kPanel + row, 1, kPanel, panel,
                                             count, first > 0, sums + row * kPanel);
          });
        }
      }
    });
  }
  write_gradient(a, total);
}

}  // namespace FDDA_ISA
}  // namespace fdda
