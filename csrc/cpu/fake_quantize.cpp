// Fake quantisation: one read and one write of the tensor; ranges of a channel are taken while its
// row is in cache.

#include <math.h>

#include "functions.h"
#include "half.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// Elements a thread takes at least: below this, waking another thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// y = (q - zero_point) * scale with q = clamp(round(x / scale + zero_point)): torch's convention.
struct Affine {
  float scale, zero_point, lo, hi;
  float operator()(float x) const {
    const float q = round_half_even(clamp(x / scale + zero_point, lo, hi));
    return (q - zero_point) * scale;
  }
};

// 1 where round(x / scale + zero_point) lies inside [lo, hi].
struct Inside {
  float scale, zero_point, lo, hi;
  bool operator()(float x) const {
    const float q = round_half_even(clamp(x / scale + zero_point, lo - 1.0f, hi + 1.0f));
    return q >= lo && q <= hi;
  }
};

// The quantiser of the FDDA paper, its float32 operations in their order.
struct Range {
  float scale, zero_point, lo, hi;
  float operator()(float x) const {
    const float q = round_half_even(clamp(scale * x - zero_point, lo, hi));
    return (q + zero_point) / scale;
  }
};

Range make_range(float x_min, float x_max, int bits) {
  const float half = static_cast<float>(int64_t{1} << (bits - 1));
  const float width = x_max - x_min;
  const float scale = (2.0f * half - 1.0f) / (width < 1e-8f ? 1e-8f : width);
  return {scale, nearbyintf(scale * x_min) + half, -half, half - 1.0f};
}

// Calls apply.interleaved for rows that run through the channels (inner == 1), else apply.row for
// rows of one channel.
template <class Apply>
void for_each_row(const ChannelView& v, Apply apply) {
  if (v.inner == 1) {
    parallel_for(v.outer, max64(1, kGrain / max64(1, v.channels)), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) apply.interleaved(o * v.channels, v.channels);
    });
  } else if (v.outer * v.channels == 1) {
    parallel_for(v.inner, kGrain,
                 [&](int64_t begin, int64_t end) { apply.row(begin, end - begin, 0); });
  } else {
    parallel_for(v.outer * v.channels, max64(1, kGrain / max64(1, v.inner)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r) {
                     apply.row(r * v.inner, v.inner, r % v.channels);
                   }
                 });
  }
}

// `make(channel)` returns the element function of a channel.
template <class T, class Make>
struct Forward {
  const T* x;
  T* y;
  Make make;
  void row(int64_t offset, int64_t n, int64_t channel) const {
    const auto f = make(channel);
    const T* __restrict in = x + offset;
    T* __restrict out = y + offset;
    for (int64_t i = 0; i < n; ++i) store(out[i], f(load(in[i])));
  }
  void interleaved(int64_t offset, int64_t n) const {
    for (int64_t c = 0; c < n; ++c) store(y[offset + c], make(c)(load(x[offset + c])));
  }
};

template <class T, class Make>
struct Masked {
  const T* x;
  const T* grad;
  T* y;
  Make make;
  void row(int64_t offset, int64_t n, int64_t channel) const {
    const auto inside = make(channel);
    const T* __restrict in = x + offset;
    const T* __restrict g = grad + offset;
    T* __restrict out = y + offset;
    for (int64_t i = 0; i < n; ++i) store(out[i], inside(load(in[i])) ? load(g[i]) : 0.0f);
  }
  void interleaved(int64_t offset, int64_t n) const {
    for (int64_t c = 0; c < n; ++c) {
      const int64_t i = offset + c;
      store(y[i], make(c)(load(x[i])) ? load(grad[i]) : 0.0f);
    }
  }
};

// Running minimum and maximum. A NaN or an infinity makes both NaN, and with them every output:
// what the formula gives too, since the scale becomes NaN or 0.
struct MinMax {
  float lo = INFINITY, hi = -INFINITY, poison = 0.0f;
  void merge(const MinMax& o) {
    lo = o.lo < lo ? o.lo : lo;
    hi = o.hi > hi ? o.hi : hi;
    poison += o.poison;
  }
  float min() const { return lo + poison; }
  float max() const { return hi + poison; }
};

template <class T>
MinMax min_max(const T* __restrict x, int64_t n) {
  constexpr int kLanes = 64;
  float lo[kLanes], hi[kLanes], poison[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    lo[j] = INFINITY;
    hi[j] = -INFINITY;
    poison[j] = 0.0f;
  }
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float v = load(x[i + j]);
      lo[j] = v < lo[j] ? v : lo[j];
      hi[j] = v > hi[j] ? v : hi[j];
      poison[j] += v - v;
    }
  }
  MinMax m;
  for (int j = 0; j < kLanes; ++j) m.merge({lo[j], hi[j], poison[j]});
  for (; i < n; ++i) {
    const float v = load(x[i]);
    m.merge({v, v, v - v});
  }
  return m;
}

template <class T>
void channel_ranges(const T* x, const ChannelView& v, MinMax* out) {
  if (v.outer * v.channels == 1) {
    const int64_t pieces = ceil_div(v.inner, kGrain);
    MinMax* partial = static_cast<MinMax*>(scratch(kSharedRows, pieces * sizeof(MinMax)));
    parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        partial[p] = min_max(x + p * kGrain, min64(kGrain, v.inner - p * kGrain));
      }
    });
    out[0] = MinMax();
    for (int64_t p = 0; p < pieces; ++p) out[0].merge(partial[p]);
    return;
  }
  parallel_for(v.channels, max64(1, kGrain / max64(1, v.outer * v.inner)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) out[c] = MinMax();
                 for (int64_t o = 0; o < v.outer; ++o) {
                   const T* row = x + (o * v.channels + begin) * v.inner;
                   for (int64_t c = begin; c < end; ++c, row += v.inner) {
                     out[c].merge(min_max(row, v.inner));
                   }
                 }
               });
}

template <class T>
void run_range(const FakeQuantizeRange& a) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const ChannelView& v = a.view;
  if (v.outer * v.channels * v.inner == 0) return;
  if (!a.x_min && v.outer == 1 && v.channels > 1) {
    parallel_for(v.channels, max64(1, kGrain / v.inner), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const MinMax m = min_max(x + c * v.inner, v.inner);
        const Range range = make_range(m.min(), m.max(), a.bits);
        const auto same = [&](int64_t) { return range; };
        Forward<T, decltype(same)>{x, y, same}.row(c * v.inner, v.inner, c);
      }
    });
    return;
  }
  Range* ranges = static_cast<Range*>(scratch(kSums, v.channels * sizeof(Range)));
  if (a.x_min) {
    for (int64_t c = 0; c < v.channels; ++c) ranges[c] = make_range(a.x_min[c], a.x_max[c], a.bits);
  } else {
    MinMax* m = static_cast<MinMax*>(scratch(kSharedWeights, v.channels * sizeof(MinMax)));
    channel_ranges(x, v, m);
    for (int64_t c = 0; c < v.channels; ++c) ranges[c] = make_range(m[c].min(), m[c].max(), a.bits);
  }
  const auto make = [&](int64_t c) { return ranges[c]; };
  for_each_row(v, Forward<T, decltype(make)>{x, y, make});
}

template <class T>
void run_forward(const FakeQuantize& a) {
  const auto make = [&](int64_t c) {
    return Affine{a.scale[c], a.zero_point[c], a.quant_min, a.quant_max};
  };
  for_each_row(a.view,
               Forward<T, decltype(make)>{static_cast<const T*>(a.x), static_cast<T*>(a.y), make});
}

template <class T>
void run_backward(const FakeQuantizeBackward& b) {
  const FakeQuantize& a = b.forward;
  const auto make = [&](int64_t c) {
    return Inside{a.scale[c], a.zero_point[c], a.quant_min, a.quant_max};
  };
  for_each_row(a.view,
               Masked<T, decltype(make)>{static_cast<const T*>(a.x), static_cast<const T*>(b.grad),
                                         static_cast<T*>(a.y), make});
}

}  // namespace

void fake_quantize(const FakeQuantize& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_forward<float>(a);
    case Dtype::kBFloat16: return run_forward<BFloat16>(a);
    case Dtype::kFloat16: return run_forward<Float16>(a);
  }
}

void fake_quantize_backward(const FakeQuantizeBackward& a) {
  switch (a.forward.dtype) {
    case Dtype::kFloat32: return run_backward<float>(a);
    case Dtype::kBFloat16: return run_backward<BFloat16>(a);
    case Dtype::kFloat16: return run_backward<Float16>(a);
  }
}

void fake_quantize_range(const FakeQuantizeRange& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return run_range<float>(a);
    case Dtype::kBFloat16: return run_range<BFloat16>(a);
    case Dtype::kFloat16: return run_range<Float16>(a);
  }
}

}  // namespace FDDA_ISA
}  // namespace fdda
