// An up-sampling convolution by Winograd's algorithm, batch norm and LeakyReLU, at once: a group of
// tiles is transformed, multiplied and finished before the next one, so that all but the weights
// stays in the second-level cache. What processors share, the outer cache and the memory, sees the
// weights once a group.

#include <string.h>

#include "parallel.h"
#include "register_panel.h"
#include "sample_norm.h"
#include "winograd_upsample.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGroup = 28;  // tiles
constexpr int kPositions = kPoints * kPoints, kAll = kProducts * kProducts;
constexpr int64_t kPad = 16;  // lest all positions, or products, share one set of the cache
constexpr int kHalo = 2;      // rows of the strip before that the next one's convolution reads

// Products in the order of their positions: where they come, and what they multiply.
struct ProductOrder {
  int slots[kAll] = {}, positions[kAll] = {};
  constexpr ProductOrder() {
    for (int k = 0; k < kAll; ++k) {
      const ProductPlace& place = kPlaces.places[k];
      slots[k] = place.first + place.variant;
      positions[slots[k]] = place.position;
    }
  }
};
constexpr ProductOrder kOrder;

// Where rows [row, row + rows) of the outputs of images from `image` on are written.
struct Outputs {
  float* y;
  int64_t image, row, rows;
};

// out[r, n] = sum over k of a[r, k] * panel[k, n]; asks for a line of every row of `next`.
template <int ROWS>
void multiply_rows(const float* a, int64_t depth, const float* panel, const float* next,
                   float* out) {
  Vector sum[ROWS][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(next + k * kPanel, 0, 2);
    add_outer_product<ROWS>(a + k, depth, panel + k * kPanel, sum);
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store_lanes(out + r * kPanel + v * kVectorLanes, sum[r][v]);
  }
}

class Group {
 public:
  explicit Group(const UpsampleNorm& a)
      : a_(a),
        position_size_(kGroup * a.inputs + kPad),
        product_size_(kGroup * kPanel + kPad),
        tiles_{a.images, a.height, a.width, a.inputs, 0, 0, a.x, nullptr},
        outputs_{a.images, 2 * a.height, 2 * a.width, a.outputs, 0, 0, nullptr, nullptr} {
    const int64_t size = kPositions * position_size_ + kAll * product_size_ + a.inputs + kPanel;
    values_ = static_cast<float*>(scratch(kTiles, size * sizeof(float)));
    products_ = values_ + kPositions * position_size_;
    zeros_ = products_ + kAll * product_size_;
    unused_ = zeros_ + a.inputs;
    memset(zeros_, 0, a.inputs * sizeof(float));
  }

  // Tiles [first, last), at most kGroup of them.
  void run(int64_t first, int64_t last, const Outputs& to) {
    transform_inputs(first, last);
    const int64_t panel_size = a_.inputs * kPanel;
    const float* panel = a_.weights;
    for (int64_t channel = 0; channel < a_.outputs; channel += kPanel) {
      for (int slot = 0; slot < kAll; ++slot, panel += panel_size) {
        const float* a = values_ + kOrder.positions[slot] * position_size_;
        float* out = products_ + slot * product_size_;
        const bool ends = slot + 1 == kAll && channel + kPanel >= a_.outputs;
        const float* next = ends ? a_.weights : panel + panel_size;
        for_each_row_tile<kRows>(last - first, [&](auto rows, int64_t row) {
          const int64_t line = row ? kVectorLanes : 0;  // of the two that a row of a panel has
          multiply_rows<decltype(rows)::kCount>(a + row * a_.inputs, a_.inputs, panel, next + line,
                                                out + row * kPanel);
        });
      }
      for (int64_t tile = first; tile < last; ++tile) write(tile, tile - first, channel, to);
    }
  }

 private:
  void transform_inputs(int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const float* pixels[kPositions];
      float* positions[kPositions];
      split_tile<kPoints, kStep, const float>(a_.x, tiles_, tile, 1, zeros_, pixels);
      for (int i = 0; i < kPoints; ++i) {
        for (int j = 0; j < kPoints; ++j) {
          positions[i * kPoints + j] =
              values_ + position_of(i, j) * position_size_ + (tile - first) * a_.inputs;
        }
      }
      transform<InputTransform>(pixels, a_.inputs, kStep * a_.inputs, positions);
    }
  }

  // Outputs of a panel's channels, from `channel` on, of the tile with `t` before it.
  void write(int64_t tile, int64_t t, int64_t channel, const Outputs& to) const {
    const float* products[kAll];
    float* pixels[kOutputs * kOutputs];
    for (int k = 0; k < kAll; ++k) {
      products[k] = products_ + kOrder.slots[k] * product_size_ + t * kPanel;
    }
    const TilePlace<kOutputs> place(outputs_, tile);
    float* corner =
        to.y + channel +
        (((place.image - to.image) * to.rows + place.top - to.row) * outputs_.width + place.left) *
            a_.outputs;
    for (int64_t i = 0; i < kOutputs; ++i) {
      for (int64_t j = 0; j < kOutputs; ++j) {
        const bool inside = place.top + i < outputs_.height && place.left + j < outputs_.width;
        pixels[i * kOutputs + j] =
            inside ? corner + (i * outputs_.width + j) * a_.outputs : unused_;
      }
    }
    const Sample sample = sample_of(a_.tables, a_.outputs, place.image);
    for_each_lanes<1>(min64(kPanel, a_.outputs - channel), [&](auto lanes, int64_t c) {
      using V = typename decltype(lanes)::V;
      const auto norm = sample.template from<V>(channel + c);
      transform_lanes<OutputTransform, V>(products, c, kPanel, [&](int k, V v) {
        store_lanes(pixels[k] + c, norm.activation(norm.norm(norm.centered(v))));
      });
    });
  }

  const UpsampleNorm& a_;
  const int64_t position_size_, product_size_;
  const WinogradTiles tiles_, outputs_;
  float *values_, *products_, *zeros_, *unused_;
};

// Of a convolution to few channels behind the norm. Images are cut into strips of whole rows of
// tiles, about as many as a group has; what a strip becomes stays in the cache.
class Strips {
 public:
  explicit Strips(const UpsampleNormTaps& b)
      : b_(b),
        rows_(ceil_div(b.norm.height, kStep)),
        columns_(ceil_div(b.norm.width, kStep)),
        strip_rows_(min64(rows_, max64(1, kGroup / columns_))),
        strip_images_(max64(1, kGroup / (rows_ * columns_))) {}

  // Of images that are done at a time.
  int64_t images() const { return strip_images_; }

  void run(int64_t image, int64_t images) const {
    const UpsampleNorm& a = b_.norm;
    const int64_t height = 2 * a.height, width = 2 * a.width, row_size = width * a.outputs;
    const int64_t halo_size = kHalo * row_size, terms = 9 * b_.channels;
    const int64_t most = kHalo + images * kOutputs * strip_rows_;
    const int64_t size = most * (row_size + terms * width);
    float* memory = static_cast<float*>(scratch(kStrip, size * sizeof(float)));
    float* planes = memory + most * row_size;
    Group group(a);
    for (int64_t top = 0; top < rows_; top += strip_rows_) {
      const int64_t bottom = min64(rows_, top + strip_rows_);
      const int64_t row = top * kOutputs, row_end = min64(height, bottom * kOutputs);
      const int64_t rows = row_end - row;
      const int64_t first = (image * rows_ + top) * columns_;
      const int64_t last = ((image + images - 1) * rows_ + bottom) * columns_;
      const int64_t groups = ceil_div(last - first, kGroup);
      float* values = memory + halo_size;
      for (int64_t k = 0; k < groups; ++k) {
        group.run(first + k * (last - first) / groups, first + (k + 1) * (last - first) / groups,
                  {values, image, row, rows});
      }
      const bool whole = row_end == height;
      float* from = row ? memory : values;
      const int64_t pixels = images * (rows + (row ? kHalo : 0)) * width;
      products({1, terms, a.outputs, pixels, b_.taps, 0, a.outputs, 1, from, 0, 1, a.outputs,
                planes, false});
      // An output row needs the one below it: the last one waits for the next strip.
      const Strip done{Dtype::kFloat32, a.images,          height,          width, image,
                       images,          max64(0, row - 1), row_end - !whole};
      sum_taps({done, b_.channels, planes, b_.bias, a.y});
      if (!whole) memcpy(memory, values + (rows - kHalo) * row_size, halo_size * sizeof(float));
    }
  }

 private:
  const UpsampleNormTaps& b_;
  const int64_t rows_, columns_, strip_rows_, strip_images_;
};

}  // namespace

// Panels [outputs / kPanel, 81, inputs, kPanel] of [inputs, 3, 3, outputs].
void winograd_upsample_panels(const WinogradWeights& a) {
  for_each_filter(a, kAll, [&](int64_t filter) {
    const float* taps[kTaps * kTaps];
    split<kTaps * kTaps>(a.from + filter * kTaps * kTaps * a.channels, a.channels, taps);
    transform_each<WeightTransform>(taps, a.channels, 0, [&](int k, int64_t c, auto v) {
      const int64_t panel = c / kPanel * kAll + kOrder.slots[k];
      store_lanes(a.to + (panel * a.filters + filter) * kPanel + c % kPanel, v);
    });
  });
}

void upsample_norm(const UpsampleNorm& a) {
  const int64_t tiles = a.images * ceil_div(a.height, kStep) * ceil_div(a.width, kStep);
  const int64_t groups = ceil_div(tiles, kGroup);
  parallel_for(groups, 1, [&](int64_t begin, int64_t end) {
    Group group(a);
    for (int64_t k = begin; k < end; ++k) {
      group.run(k * tiles / groups, (k + 1) * tiles / groups, {a.y, 0, 0, 2 * a.height});
    }
  });
}

void upsample_norm_taps(const UpsampleNormTaps& b) {
  const Strips strips(b);
  const int64_t images = b.norm.images, step = strips.images();
  parallel_for(ceil_div(images, step), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      strips.run(k * step, min64(step, images - k * step));
    }
  });
}

}  // namespace FDDA_ISA
}  // namespace fdda
