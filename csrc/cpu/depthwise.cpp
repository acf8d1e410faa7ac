// Depthwise convolution: channels are adjacent in memory and independent, so lanes are channels.
//
// Product instructions add up the products within 32 bits: of 4 inputs with 8-bit weights, of 2
// with 16-bit ones. As many kernel rows make a group. For a row of outputs, every input column is
// interleaved once:
//
//     row 0   a0 a1 a2 ..
//     row 1   b0 b1 b2 ..   becomes   a0 b0 c0 d0 | a1 b1 c1 d1 | ..   a lane per channel
//     ..
//
// An output then is a sum over the kernel's columns without any checks: padding is interleaved as
// the zero point, which adds 0 to sum (x - x_zero_point) * w = sum x * w - x_zero_point * sum w.

#include <string.h>

#include "expand.h"
#include "functions.h"
#include "parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__)
#include "depthwise_3x3_avx512.h"
#endif

namespace fdda {
namespace FDDA_ISA {
namespace {

// kPixels: adjacent outputs computed at once, as many as there are registers for.
#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64, kPixels = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kPixels = 2;
#else
constexpr int kVectorBytes = 16, kPixels = 2;
#endif
// The weights that products of 8 bits are exact for.
#if defined(__AVX512VNNI__)
constexpr int64_t kLeastS8 = -128, kMostS8 = 127;
#elif defined(__AVX2__)
constexpr int64_t kLeastS8 = -64, kMostS8 = 64;  // vpmaddubsw: 2 * 255 * 64 fits s16
#endif
constexpr int64_t kChunkBytes = 16384;  // of interleaved columns: they stay in the L1 cache

#if defined(__SSE2__)
// dot: sum += products of the s8 or s16 weights within each 32 bits with as many u8 or u16 inputs;
// round: half to even; pack: s32 that fit u8, per 16 bytes those of a, b, c, d.
#if defined(__AVX512VNNI__)
#define FDDA_DOT_S8(PREFIX) PREFIX##_dpbusd_epi32(sum, x, w)
#define FDDA_DOT_S16(PREFIX) PREFIX##_dpwssd_epi32(sum, x, w)
#else
#define FDDA_DOT_S8(PREFIX) \
  PREFIX##_add_epi32(sum, PREFIX##_madd_epi16(PREFIX##_maddubs_epi16(x, w), PREFIX##_set1_epi16(1)))
#define FDDA_DOT_S16(PREFIX) PREFIX##_add_epi32(sum, PREFIX##_madd_epi16(x, w))
#endif
#define FDDA_VECTORS(REGISTER, PREFIX)                                                    \
  inline REGISTER##i dot(REGISTER##i sum, REGISTER##i x, REGISTER##i w, int16_t) {        \
    return FDDA_DOT_S16(PREFIX);                                                          \
  }                                                                                       \
  inline REGISTER##i round(REGISTER v) { return PREFIX##_cvtps_epi32(v); }                \
  inline REGISTER##i pack(REGISTER##i a, REGISTER##i b, REGISTER##i c, REGISTER##i d) {   \
    return PREFIX##_packus_epi16(PREFIX##_packs_epi32(a, b), PREFIX##_packs_epi32(c, d)); \
  }
#define FDDA_VECTORS_S8(REGISTER, PREFIX)                                         \
  inline REGISTER##i dot(REGISTER##i sum, REGISTER##i x, REGISTER##i w, int8_t) { \
    return FDDA_DOT_S8(PREFIX);                                                   \
  }
FDDA_VECTORS(__m128, _mm)
#if defined(__AVX2__)
FDDA_VECTORS(__m256, _mm256)
FDDA_VECTORS_S8(__m128, _mm)
FDDA_VECTORS_S8(__m256, _mm256)
#endif
#if defined(__AVX512BW__)
FDDA_VECTORS(__m512, _mm512)
FDDA_VECTORS_S8(__m512, _mm512)
#endif
#undef FDDA_VECTORS_S8
#undef FDDA_VECTORS
#undef FDDA_DOT_S16
#undef FDDA_DOT_S8
#endif

template <int BYTES>
struct Types {
  typedef uint8_t U8 __attribute__((vector_size(BYTES)));
  typedef uint16_t U16 __attribute__((vector_size(BYTES)));
  typedef int32_t S32 __attribute__((vector_size(BYTES)));
  typedef uint32_t U32 __attribute__((vector_size(BYTES)));
  typedef float F32 __attribute__((vector_size(BYTES)));
  typedef long long S64 __attribute__((vector_size(BYTES)));
};

// A block of expand_block(): four codes a lane, a lane per channel.
typedef Types<kBlockCodes>::S32 PanelCodes;

template <class Weight, class U32>
inline U32 add_products(U32 sum, U32 x, U32 w) {
#if defined(__SSE2__)
  typedef typename Types<sizeof(U32)>::S64 S64;  // what intrinsics take
  return (U32)dot((S64)sum, (S64)x, (S64)w, Weight());
#else
  // Both s16 of w with their signs.
  typedef typename Types<sizeof(U32)>::S32 S32;
  const U32 low = (U32)((S32)(w << 16) >> 16), high = (U32)((S32)w >> 16);
  return sum + (x & 0xffff) * low + (x >> 16) * high;
#endif
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct IndicesTo : IndicesTo<N - 1, N - 1, I...> {};
template <int... I>
struct IndicesTo<0, I...> : Indices<I...> {};

// Per 16 bytes, the first (HALF 0) or last (HALF 1) elements of a and b in turn.
template <int HALF, class V, int... I>
inline V interleave(V a, V b, Indices<I...>) {
  constexpr int count = sizeof...(I), lane = 16 * count / sizeof(V);
  return __builtin_shufflevector(
      a, b, (I / lane * lane + HALF * lane / 2 + I % lane / 2 + I % 2 * count)...);
}

// Per 16 bytes, the even elements of a, then those of b.
template <class V, int... I>
inline V evens(V a, V b, Indices<I...>) {
  constexpr int count = sizeof...(I), lane = 16 * count / sizeof(V);
  return __builtin_shufflevector(
      a, b, (I / lane * lane + I * 2 % lane + (I % lane < lane / 2 ? 0 : count))...);
}

// Numbers of 0 to 255 in the order of a block's vectors, rounded half to even, in that of channels.
template <class U8, class F32>
inline U8 rounded(const F32 (&v)[4]) {
#if defined(__SSE2__)
  return (U8)pack(round(v[0]), round(v[1]), round(v[2]), round(v[3]));
#else
  typedef typename Types<sizeof(U8)>::U16 U16;
  constexpr IndicesTo<sizeof(U8) / 2> halves;
  // The low bytes of what round_half_even() adds up.
  constexpr float magic = 12582912.0f;
  const U16 low = evens((U16)(v[0] + magic), (U16)(v[1] + magic), halves);
  const U16 high = evens((U16)(v[2] + magic), (U16)(v[3] + magic), halves);
  return evens((U8)low, (U8)high, IndicesTo<sizeof(U8)>());
#endif
}

// 32 bits for each of BYTES channels: channel 16 p + 4 k + i is lane 4 p + i of vectors[k].
template <int BYTES>
struct Block {
  typedef typename Types<BYTES>::U8 U8;
  typedef typename Types<BYTES>::U16 U16;
  typedef typename Types<BYTES>::S32 S32;
  typedef typename Types<BYTES>::U32 U32;
  typedef typename Types<BYTES>::F32 F32;
  static constexpr int kChannels = BYTES;
  static constexpr int kPanels = BYTES / kPanelRows;
  U32 vectors[4];

  void set_panel(int64_t panel, const void* values) {
    for (int k = 0; k < 4; ++k) {
      memcpy(reinterpret_cast<char*>(vectors + k) + 16 * panel,
             static_cast<const char*>(values) + 16 * k, 16);
    }
  }

  // The numbers in the order of channels.
  template <class T>
  struct Numbers {
    T values[kChannels];
  };
  template <class T>
  Numbers<T> numbers() const {
    Numbers<T> out;
    for (int p = 0; p < kPanels; ++p) {
      for (int k = 0; k < 4; ++k) {
        memcpy(out.values + 16 * p + 4 * k, reinterpret_cast<const char*>(vectors + k) + 16 * p,
               16);
      }
    }
    return out;
  }

  F32 floats(int k) const { return __builtin_convertvector((S32)vectors[k], F32); }

  void interleave_rows(const U8 (&rows)[4]) {
    constexpr IndicesTo<BYTES / 2> halves;
    interleave_pairs((U16)low(rows[0], rows[1]), (U16)low(rows[2], rows[3]), vectors, halves);
    interleave_pairs((U16)high(rows[0], rows[1]), (U16)high(rows[2], rows[3]), vectors + 2, halves);
  }

  void interleave_rows(const U8 (&rows)[2]) {
    widen(low(rows[0], rows[1]), vectors);
    widen(high(rows[0], rows[1]), vectors + 2);
  }

  static U8 low(U8 a, U8 b) { return interleave<0>(a, b, IndicesTo<BYTES>()); }
  static U8 high(U8 a, U8 b) { return interleave<1>(a, b, IndicesTo<BYTES>()); }
  template <class I>
  static void interleave_pairs(U16 a, U16 b, U32* out, I indices) {
    out[0] = (U32)interleave<0>(a, b, indices);
    out[1] = (U32)interleave<1>(a, b, indices);
  }
  static void widen(U8 a, U32* out) {
    out[0] = (U32)low(a, U8{});
    out[1] = (U32)high(a, U8{});
  }
};

// The first `count` numbers of COUNT; the rest are 0.
template <class V, int COUNT, class T>
inline V load_channels(const T* from, int64_t count) {
  static_assert(sizeof(V) == COUNT * sizeof(T), "as many bytes");
  V v;
  if (count == COUNT) {
    memcpy(&v, from, sizeof v);
    return v;
  }
  V part{};
  memcpy(&part, from, count * sizeof(T));
  return part;
}

template <int COUNT, class V, class T>
inline void store_channels(T* to, const V& v, int64_t count) {
  if (count == COUNT) {
    memcpy(to, &v, sizeof v);
  } else {
    const V part = v;
    memcpy(to, &part, count * sizeof(T));
  }
}

// body(Block, first channel) for all channels, in blocks as wide as vectors are, then narrower.
template <int BYTES, class Body>
void for_each_block(int64_t channel, int64_t channels, Body body) {
  for (; channels - channel > BYTES - kPanelRows; channel += BYTES) body(Block<BYTES>(), channel);
  if constexpr (BYTES > kPanelRows) for_each_block<BYTES / 2>(channel, channels, body);
}

// WIDE: weights need more than 16 bits, or their products' sums more than 32. Then codes and inputs
// are summed separately, and offsets join in 64 bits.
template <class Weight, bool WIDE>
class Depthwise {
  static constexpr int kGroup = sizeof(int32_t) / sizeof(Weight);

 public:
  explicit Depthwise(const PackedConv& conv)
      : conv_(conv),
        groups_(ceil_div(conv.kernel_h, kGroup)),
        depth_(conv.kernel_w * groups_),
        table_rows_(WIDE ? 2 * (depth_ + 1) : depth_ + 3) {}

  void run() const {
    const int64_t panels = ceil_div(conv_.channels, kPanelRows);
    int32_t* table = static_cast<int32_t*>(
        scratch(kSharedWeights, panels * kPanelRows * table_rows_ * sizeof(int32_t)));
    for_each_block<kVectorBytes>(0, conv_.channels, [&](auto type, int64_t channel) {
      using B = decltype(type);
      B* block = reinterpret_cast<B*>(table + channel * table_rows_);
      for (int64_t p = 0; p < B::kPanels; ++p) fill(channel + p * kPanelRows, p, block);
    });
    uint8_t zero_points[kVectorBytes];
    memset(zero_points, conv_.x_zero_point, sizeof zero_points);
    const int64_t rows = conv_.batch * conv_.out_height;
    const int64_t work = conv_.out_width * conv_.channels * conv_.kernel_h * conv_.kernel_w;
    parallel_for(rows, max64(1, 65536 / max64(1, work)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for_each_block<kVectorBytes>(0, conv_.channels, [&](auto type, int64_t channel) {
          using B = decltype(type);
          const B* block = reinterpret_cast<const B*>(table + channel * table_rows_);
          row(r, channel, zero_points, block);
        });
      }
    });
  }

 private:
  // A panel's part of its block's table: weights, the sums' start, multiplier and bias; if WIDE,
  // codes and their sums' start, ones and theirs.
  template <class B>
  void fill(int64_t channel, int64_t panel, B* table) const {
    const int64_t blocks = ceil_div(conv_.kernel_h * conv_.kernel_w, kBlockDepth);
    const uint8_t* planes = conv_.weight + channel / kPanelRows * blocks * conv_.bits * kPlaneBytes;
    PanelCodes* codes = static_cast<PanelCodes*>(scratch(kPlanes, blocks * sizeof(PanelCodes)));
    for (int64_t i = 0; i < blocks; ++i) {
      expand_block(planes + i * conv_.bits * kPlaneBytes, conv_.bits,
                   reinterpret_cast<int8_t*>(codes + i));
    }
    PanelCodes offset{};
    if constexpr (WIDE) {
      fill_weights(codes, offset, panel, table);
      memset(codes, 0, blocks * sizeof(PanelCodes));
      fill_weights(codes, offset + 1, panel, table + depth_ + 1);
    } else {
      const int64_t count = min64(kPanelRows, conv_.channels - channel);
      for (int64_t n = 0; n < count; ++n) {
        offset[n] = static_cast<int32_t>(conv_.weight_offset[channel + n]);
      }
      fill_weights(codes, offset, panel, table);
      float multiplier[kPanelRows] = {}, bias[kPanelRows] = {};
      memcpy(multiplier, conv_.epilogue.multiplier + channel, count * sizeof(float));
      memcpy(bias, conv_.epilogue.bias + channel, count * sizeof(float));
      table[depth_ + 1].set_panel(panel, multiplier);
      table[depth_ + 2].set_panel(panel, bias);
    }
  }

  // Weights code + offset in groups, then the sums' start: -x_zero_point * sum w.
  template <class B>
  void fill_weights(const PanelCodes* codes, const PanelCodes& offset, int64_t panel,
                    B* table) const {
    typedef typename Types<sizeof(PanelCodes)>::U32 U32;
    constexpr int kBits = 8 * sizeof(Weight);
    constexpr uint32_t kMask = (uint64_t{1} << kBits) - 1;
    U32 sum{};
    for (int64_t kw = 0; kw < conv_.kernel_w; ++kw) {
      for (int64_t first = 0; first < conv_.kernel_h; first += kGroup, ++table) {
        U32 group{};
        const int64_t rows = min64(kGroup, conv_.kernel_h - first);
        for (int64_t k = 0; k < rows; ++k) {
          const uint64_t tap = (first + k) * conv_.kernel_w + kw;
          const int left = 24 - 8 * (tap % kBlockDepth);
          const PanelCodes code = (PanelCodes)((U32)codes[tap / kBlockDepth] << left) >> 24;
          const U32 weight = (U32)(code + offset);
          sum += weight;
          group |= (weight & kMask) << static_cast<int>(k * kBits);
        }
        table->set_panel(panel, &group);
      }
    }
    sum *= static_cast<uint32_t>(-conv_.x_zero_point);
    table->set_panel(panel, &sum);
  }

  // The outputs of a block of channels in one row of outputs.
  template <class B>
  void row(int64_t r, int64_t channel, const uint8_t* zero_points, const B* table) const {
    const int64_t span = (conv_.kernel_w - 1) * conv_.dilation_w + 1;
    // At least 4 windows: chunks interleave the columns again that their windows share.
    const int64_t most = max64(kChunkBytes / static_cast<int64_t>(groups_ * sizeof(B)), 4 * span);
    const int64_t chunk = min64(conv_.out_width, (most - span) / conv_.stride_w + 1);
    B* columns = static_cast<B*>(
        scratch(kLocalRows, ((chunk - 1) * conv_.stride_w + span) * groups_ * sizeof(B)));
    for (int64_t first = 0; first < conv_.out_width; first += chunk) {
      const int64_t outputs = min64(chunk, conv_.out_width - first);
      const int64_t left = first * conv_.stride_w - conv_.pad_w;
      gather(r, channel, left, (outputs - 1) * conv_.stride_w + span, zero_points, columns);
      const int64_t index = (r * conv_.out_width + first) * conv_.channels + channel;
      if constexpr (WIDE) {
        for (int64_t i = 0; i < outputs; ++i) store_wide(columns, i, table, index, channel);
      } else {
        const Epilogue& e = conv_.epilogue;
        if (e.out_u8 && !e.residual_u8 && !e.residual_f32) {
          store<kPixels, true>(columns, 0, outputs, table, index, channel);
        } else {
          store<1, false>(columns, 0, outputs, table, index, channel);
        }
      }
    }
  }

  // `count` input columns from `left` on, [count, groups].
  template <class B>
  void gather(int64_t r, int64_t channel, int64_t left, int64_t count, const uint8_t* zero_points,
              B* columns) const {
    const int64_t channels = conv_.channels, line = conv_.width * channels;
    const uint8_t* image = conv_.x + r / conv_.out_height * conv_.height * line;
    const uint8_t* end = conv_.x + conv_.batch * conv_.height * line;
    const int64_t top = r % conv_.out_height * conv_.stride_h - conv_.pad_h;
    // Columns before `inside` and from `outside` on are padding.
    const int64_t inside = min64(count, max64(0, -left));
    const int64_t outside = max64(inside, min64(count, conv_.width - left));
    B padding;
    typename B::U8 rows[kGroup];
    for (auto& v : rows) memcpy(&v, zero_points, sizeof v);
    padding.interleave_rows(rows);
    for (int64_t g = 0; g < groups_; ++g) {
      const uint8_t* x[kGroup];
      int64_t step[kGroup];
      bool whole = true;  // no vector of these columns ends behind the tensor
      for (int k = 0; k < kGroup; ++k) {
        const int64_t kh = g * kGroup + k, ih = top + kh * conv_.dilation_h;
        const bool valid = kh < conv_.kernel_h && ih >= 0 && ih < conv_.height;
        step[k] = valid ? channels : 0;
        x[k] = valid ? image + ih * line + (left + inside) * channels + channel : zero_points;
        whole = whole && (!valid || end - x[k] >= (outside - inside - 1) * channels + B::kChannels);
      }
      const int64_t bytes = whole ? B::kChannels : channels - channel;
      int64_t i = 0;
      for (; i < inside; ++i) columns[i * groups_ + g] = padding;
      for (; i < outside; ++i) {
#pragma GCC unroll 4
        for (int k = 0; k < kGroup; ++k) {
          rows[k] = load_channels<typename B::U8, B::kChannels>(x[k], bytes);
          x[k] += step[k];
        }
        columns[i * groups_ + g].interleave_rows(rows);
      }
      for (; i < count; ++i) columns[i * groups_ + g] = padding;
    }
  }

  // The sums of PIXELS adjacent outputs, the window of the first of which begins at `columns`.
  template <int PIXELS, class B>
  void sums(const B* columns, const B* table, B* out) const {
    typedef typename B::U32 U32;
    const int64_t stride = conv_.stride_w * groups_;
    U32 sum[PIXELS][4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
#pragma GCC unroll 4
      for (int p = 0; p < PIXELS; ++p) sum[p][k] = table[depth_].vectors[k];
    }
    // Kernel columns that are adjacent in the input are as one.
    const int64_t runs = conv_.dilation_w == 1 ? 1 : conv_.kernel_w, length = depth_ / runs;
    for (int64_t r = 0; r < runs; ++r, columns += conv_.dilation_w * groups_) {
      for (int64_t j = 0; j < length; ++j, ++table) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const U32 weight = table->vectors[k];
#pragma GCC unroll 4
          for (int p = 0; p < PIXELS; ++p) {
            const U32 x = columns[p * stride + j].vectors[k];
            sum[p][k] = add_products<Weight>(sum[p][k], x, weight);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) out[p].vectors[k] = sum[p][k];
    }
  }

  // Outputs from i on, PIXELS at a time, then fewer. PLAIN: codes without residual.
  template <int PIXELS, bool PLAIN, class B>
  void store(const B* columns, int64_t i, int64_t outputs, const B* table, int64_t index,
             int64_t channel) const {
    const Epilogue e = conv_.epilogue;  // not to be read again after every store
    const int64_t stride = conv_.stride_w * groups_, channels = conv_.channels;
    const int64_t count = min64(B::kChannels, channels - channel);
    for (; i + PIXELS <= outputs; i += PIXELS) {
      B acc[PIXELS];
      sums<PIXELS>(columns + i * stride, table, acc);
#pragma GCC unroll 4
      for (int p = 0; p < PIXELS; ++p) {
        store_output<PLAIN>(e, acc[p], table + depth_ + 1, index + (i + p) * channels, count);
      }
    }
    if constexpr (PIXELS > 1) {
      store<PIXELS / 2, PLAIN>(columns, i, outputs, table, index, channel);
    }
  }

  // store_output() of packed.h for the first `count` channels of a block.
  template <bool PLAIN, class B>
  static void store_output(const Epilogue& e, const B& acc, const B* factors, int64_t index,
                           int64_t count) {
    typedef typename B::F32 F32;
    const B &multiplier = factors[0], &bias = factors[1];
    F32 v[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      v[k] = acc.floats(k) * (F32)multiplier.vectors[k] + (F32)bias.vectors[k];
    }
    if constexpr (!PLAIN) add_residual<B>(e, index, count, v);
    if (PLAIN || e.out_u8) {
      const F32 lo = F32{} + e.lo, hi = F32{} + e.hi;
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        v[k] = v[k] > lo ? v[k] : lo;  // as requantize(): NaN becomes lo
        v[k] = v[k] > hi ? hi : v[k];
      }
      const typename B::U8 codes = rounded<typename B::U8>(v);
      store_channels<B::kChannels>(e.out_u8 + index, codes, count);
    } else {
      B bits;
      for (int k = 0; k < 4; ++k) bits.vectors[k] = (typename B::U32)v[k];
      store_channels<B::kChannels>(e.out_f32 + index, bits.template numbers<float>(), count);
    }
  }

  template <class B>
  static void add_residual(const Epilogue& e, int64_t index, int64_t count, typename B::F32* v) {
    B residual;
    if (e.residual_u8) {
      using U8 = typename B::U8;
      const U8 rows[4] = {load_channels<U8, B::kChannels>(e.residual_u8 + index, count)};
      residual.interleave_rows(rows);
      for (int k = 0; k < 4; ++k) v[k] = v[k] + residual.floats(k) * e.residual_scale;
    }
    if (e.residual_f32) {
      using Numbers = typename B::template Numbers<float>;
      const Numbers numbers = load_channels<Numbers, B::kChannels>(e.residual_f32 + index, count);
      for (int p = 0; p < B::kPanels; ++p) {
        residual.set_panel(p, numbers.values + p * kPanelRows);
      }
      for (int k = 0; k < 4; ++k) {
        v[k] = v[k] + (typename B::F32)residual.vectors[k] * e.residual_scale;
      }
    }
  }

  template <class B>
  void store_wide(const B* columns, int64_t i, const B* table, int64_t index,
                  int64_t channel) const {
    const int64_t count = min64(B::kChannels, conv_.channels - channel);
    columns += i * conv_.stride_w * groups_;
    index += i * conv_.channels;
    B acc;
    sums<1>(columns, table, &acc);
    const auto products = acc.template numbers<int32_t>();
    sums<1>(columns, table + depth_ + 1, &acc);
    const auto inputs = acc.template numbers<int32_t>();
    for (int64_t n = 0; n < count; ++n) {
      fdda::store_output(conv_.epilogue, index + n, channel + n,
                         products.values[n] + conv_.weight_offset[channel + n] * inputs.values[n]);
    }
  }

  const PackedConv& conv_;
  const int64_t groups_, depth_, table_rows_;
};

// Whether code + offset is from `least` to `most` for every channel and code.
bool weights_fit(const PackedConv& a, int64_t least, int64_t most) {
  const int64_t half = int64_t{1} << (a.bits - 1);
  bool fit = true;
  for (int64_t c = 0; c < a.channels; ++c) {
    fit &= a.weight_offset[c] - half >= least && a.weight_offset[c] + half - 1 <= most;
  }
  return fit;
}

}  // namespace

void depthwise_conv2d(const PackedConv& a) {
#if defined(__AVX512VNNI__)
  if (Depthwise3x3::applies(a)) return Depthwise3x3(a).run();
#endif
#if defined(__AVX2__)
  if (weights_fit(a, kLeastS8, kMostS8)) return Depthwise<int8_t, false>(a).run();
#endif
  // Sums of products with u8 must be s32.
  const int64_t most = min64(INT16_MAX, INT32_MAX / (255 * a.kernel_h * a.kernel_w));
  if (weights_fit(a, -most, most)) return Depthwise<int16_t, false>(a).run();
  Depthwise<int16_t, true>(a).run();
}

}  // namespace FDDA_ISA
}  // namespace fdda
