// Nearest x2 up-sampling and a 3x3 convolution in bfloat16 by Winograd's algorithm: 4 x 4 outputs
// by 25 products, not 36 (upsample_conv.cpp) or 144.
//
// As in winograd_upsample.cpp, but by F(2, 3): the filter (a, b, c) behind the up-sampling is
// (a, b + c, 0) for the even outputs and (0, a + b, c) for the odd ones, on the same tile of 4
// inputs. At the point 0 the odd filter is zero, at infinity the even one, and at 1 both are equal,
// so that one product is enough there; -1 needs two: 5 for 4 outputs. The gradient with respect to
// x takes even and odd pixels of grad_y apart and has the same filters, rotated by half a turn.

#include "winograd_bfloat16.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int kUpsampled = 2 * kOutputs;
constexpr int kProducts = 5;  // points 0, 1, -1 (even), -1 (odd), infinity
constexpr int kSecond = 3;    // the second one of a point

int position_of(int k) {
  const int i = k / kProducts, j = k % kProducts;
  return (i - (i >= kSecond)) * kPoints + j - (j >= kSecond);
}

struct WeightTransform {
  static constexpr int kFrom = kTaps, kTo = kProducts;
  template <class V>
  static void apply(const V* x, V* y) {
    y[0] = x[0];
    y[1] = 0.5f * ((x[0] + x[2]) + x[1]);
    y[2] = 0.5f * ((x[0] - x[2]) - x[1]);
    y[3] = 0.5f * ((x[2] - x[0]) - x[1]);
    y[4] = x[2];
  }
};

struct Forward {
  using InputTransform = F2Input;
  static constexpr int kInputStep = kOutputs;
  using WeightTransform = FDDA_ISA::WeightTransform;

  static constexpr int kFilters = kProducts * kProducts;
  static int value(int k) { return position_of(k); }
  static int sum(int k) { return k; }
  static bool adds(int) { return false; }

  struct OutputTransform {
    static constexpr int kFrom = kProducts, kTo = kUpsampled;
    template <class V>
    static void apply(const V* x, V* y) {
      y[0] = x[0] + (x[1] + x[2]);
      y[1] = x[1] + x[3];
      y[2] = x[1] - x[2];
      y[3] = (x[1] - x[3]) - x[4];
    }
  };

  // The transpose of OutputTransform.
  struct GradientTransform {
    static constexpr int kFrom = kUpsampled, kTo = kProducts;
    template <class V>
    static void apply(const V* x, V* y) {
      y[0] = x[0];
      y[1] = (x[0] + x[2]) + (x[1] + x[3]);
      y[2] = x[0] - x[2];
      y[3] = x[1] - x[3];
      y[4] = V{} - x[3];
    }
  };

  // The transpose of WeightTransform.
  struct WeightGradientTransform {
    static constexpr int kFrom = kProducts, kTo = kTaps;
    template <class V>
    static void apply(const V* x, V* y) {
      const V half = 0.5f * x[1], difference = 0.5f * (x[2] - x[3]);
      y[0] = x[0] + (half + difference);
      y[1] = half - 0.5f * (x[2] + x[3]);
      y[2] = x[4] + (half - difference);
    }
  };
};

struct Backward {
  struct InputTransform {
    static constexpr int kFrom = kUpsampled + 2, kTo = kProducts;
    template <class V>
    static void apply(const V* x, V* y) {
      y[0] = x[0] - x[4];
      y[1] = (x[1] + x[3]) + (x[2] + x[4]);
      y[2] = x[4] - x[2];
      y[3] = x[3] - x[1];
      y[4] = x[1] - x[5];
    }
  };
  static constexpr int kInputStep = kUpsampled;
  using OutputTransform = F2Output;
  using WeightTransform = FDDA_ISA::WeightTransform;

  static constexpr int kFilters = kProducts * kProducts;
  static int value(int k) { return k; }
  static int sum(int k) { return position_of(k); }
  static bool adds(int k) { return k / kProducts == kSecond || k % kProducts == kSecond; }
};

}  // namespace

void winograd_upsample_bfloat16(const WinogradBFloat16& a) {
  const int64_t inputs = a.shape.inputs, outputs = a.shape.outputs;
  if (a.rotated) {
    convolve<Backward>(a, tiles_of(a.shape, inputs, 2), tiles_of(a.shape, outputs, 1));
  } else {
    convolve<Forward>(a, tiles_of(a.shape, inputs, 1), tiles_of(a.shape, outputs, 2));
  }
}

void winograd_upsample_bfloat16_gradient(const WinogradBFloat16Gradient& a) {
  filter_gradient<Forward>(a, tiles_of(a.shape, a.shape.inputs, 1),
                           tiles_of(a.shape, a.shape.outputs, 2));
}

}  // namespace FDDA_ISA
}  // namespace fdda
