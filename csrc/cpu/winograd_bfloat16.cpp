// 3x3 convolutions in bfloat16 by Winograd's F(2x2, 3x3): 4 outputs by 16 products, not 36.

#include "winograd_bfloat16.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

struct Form {
  using InputTransform = F2Input;
  static constexpr int kInputStep = kOutputs;
  using OutputTransform = F2Output;

  static constexpr int kFilters = kPoints * kPoints;
  static int value(int k) { return k; }
  static int sum(int k) { return k; }
  static bool adds(int) { return false; }

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
};

}  // namespace

void winograd_bfloat16(const WinogradBFloat16& a) {
  convolve<Form>(a, tiles_of(a.shape, a.shape.inputs, 1), tiles_of(a.shape, a.shape.outputs, 1));
}

void winograd_bfloat16_gradient(const WinogradBFloat16Gradient& a) {
  filter_gradient<Form>(a, tiles_of(a.shape, a.shape.inputs, 1),
                        tiles_of(a.shape, a.shape.outputs, 1));
}

}  // namespace FDDA_ISA
}  // namespace fdda
