// The dispatch table: one function pointer per kernel, one table per instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/codes.h"
#include "../common/packed.h"

namespace fdda {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// A dense tensor seen as [outer, channels, inner]; per-tensor parameters: outer = channels = 1.
struct ChannelView {
  int64_t outer, channels, inner;
};

struct FakeQuantize {
  Dtype dtype;
  const void* x;
  void* y;
  ChannelView view;
  const float* scale;       // [channels]
  const float* zero_point;  // [channels]
  float quant_min, quant_max;
};

struct FakeQuantizeBackward {
  FakeQuantize forward;  // `y` receives the gradient with respect to x; null: that is `grad`
  const void* grad;
  int64_t channels;        // of scale; the view of an empty tensor has none
  float* grad_scale;       // [channels] or null
  float* grad_zero_point;  // [channels] or null, with grad_scale
};

// x_min and x_max null: taken from x.
struct FakeQuantizeRange {
  Dtype dtype;
  const void* x;
  void* y;
  ChannelView view;
  const float* x_min;  // [channels]
  const float* x_max;  // [channels]
  int bits;
};

struct FakeQuantizeRangeBackward {
  FakeQuantizeRange forward;  // `y` receives the gradient with respect to x; null: that is `grad`
  const void* grad;
  int64_t channels;   // of x_min
  float* grad_x_min;  // [channels] or null
  float* grad_x_max;  // [channels] or null, with grad_x_min
};

struct ObserveRange {
  Dtype dtype;
  const void* x;
  int64_t count;
  const float *x_min, *x_max;
  double keep;
  bool include_zero;
  float *new_min, *new_max;
};

// Eval-mode batch norm, an optional addition and clipping of the x of ClassMoments:
// y = clamp(x * scale + shift + residual, low, high), in the same pass.
struct BnRelu {
  const float* scale;  // [channels]
  const float* shift;  // [channels]
  float low, high;
};

// channels_last: element (n, c, i) at (n * inner + i) * channels + c, else (n * channels + c) *
// inner + i.
struct ClassMoments {
  Dtype dtype;
  const void* x;
  int64_t batch, channels, inner;
  bool channels_last;
  const int64_t* labels;  // [batch]
  int64_t num_classes;
  float* mean;  // [num_classes, channels]
  float* var;
  int64_t* count;         // [num_classes]
  const BnRelu* bn_relu;  // or null
  const void* residual;   // laid out like x, or null; with bn_relu only
  void* y;                // laid out like x; with bn_relu only
};

struct ClassMomentsBackward {
  Dtype dtype;
  const void* x;
  void* grad_x;
  int64_t batch, channels, inner;
  bool channels_last;
  const int64_t* labels;
  const float* grad_mean;  // [num_classes, channels]
  const float* grad_var;
  const float* mean;
  const int64_t* count;
  const BnRelu* bn_relu;  // or null
  const void* residual;   // laid out like x, or null; with bn_relu only
  const void* grad_y;     // laid out like x; with bn_relu only
  void* grad_residual;    // laid out like x; with residual only
};

// y = quantise(clamp(x * scale + shift [+ residual], low, high)); the view's channels are the batch
// norm's.
struct BnReluFakeQuantize {
  Dtype dtype;
  const void* x;
  const void* residual;  // laid out like x, or null
  void* y;               // laid out like x
  ChannelView view;
  BnRelu norm;
  float x_min, x_max;
  int bits;
};

struct BnReluFakeQuantizeBackward {
  BnReluFakeQuantize forward;  // `y` receives the gradient with respect to x
  const void* grad;            // laid out like x
  bool clipped;                // no gradient beyond the range
  bool range;                  // whether the range's gradient is wanted
  int64_t channels;
  const float* mean;               // [channels], of the batch norm
  const float* inv_std;            // [channels]
  void* grad_residual;             // laid out like x, with residual
  float *grad_weight, *grad_bias;  // [channels]
  float *grad_x_min, *grad_x_max;  // with range
};

// out[i] = a[i] b[i], or added to it, of [count, rows, depth] and [count, depth, columns] with the
// given strides; out is dense.
struct Products {
  int64_t count, rows, depth, columns;
  const float* a;
  int64_t a_position, a_row, a_depth;
  const float* b;
  int64_t b_position, b_depth, b_column;
  float* out;
  bool add;
};

// out = a b of bfloat16 [rows, depth] and [depth, columns] with the given strides; out is dense, of
// bfloat16 or, for a result that is added to it, float32.
struct ProductBFloat16 {
  int64_t rows, depth, columns;
  const uint16_t* a;
  int64_t a_row, a_depth;
  const uint16_t* b;
  int64_t b_depth, b_column;
  uint16_t* out;
  float* total;  // or null
};

// y[n, p, c] = sum over k of z[n, k] * weight[c * pixels + p, k] + bias[c * pixels + p].
struct LinearMaps {
  Dtype dtype;  // of y
  int64_t images, inputs, channels, pixels;
  const float *z, *weight, *bias;
  void* y;
};

struct LinearMapsGradient {
  Dtype dtype;  // of grad_y
  int64_t images, inputs, channels, pixels;
  const void* grad_y;
  const float* z;
  float *grad_weight, *grad_bias;
};

// Of real numbers, with the window's tap that each maximum comes from: at most 255 taps.
struct MaxPool2d {
  PoolShape shape;
  Dtype dtype;
  const void* x;
  void* y;
  uint8_t* tap;
};

struct MaxPool2dGradient {
  PoolShape shape;
  Dtype dtype;
  const void* grad_y;
  const uint8_t* tap;
  void* grad_x;
};

struct PackWeight {
  const int32_t* codes;  // [rows, cols]
  int64_t rows, cols;
  int bits;
  uint8_t* packed;
};

struct UnpackWeight {
  const uint8_t* packed;
  int bits;
  int64_t rows, cols;
  int8_t* codes;
};

// y = leaky_relu((x - mean) / sqrt(var + eps) * weight + bias); x as in ClassMoments.
struct ConditionalBn {
  Dtype dtype;
  const void* x;
  void* y;
  int64_t batch, channels, inner;
  bool channels_last;
  const int64_t* labels;  // [batch], rows of weight and bias
  const int64_t* group;   // [batch], rows of mean and var
  const float* mean;
  const float* var;
  const float* weight;
  const float* bias;
  double eps;
  float negative_slope;
};

// mean and var are those of x within the group.
struct ConditionalBnBackward {
  ConditionalBn forward;  // `y` receives the gradient with respect to x
  const void* grad_y;
  int64_t num_classes, num_groups;
  const int64_t* group_size;  // [num_groups], in samples
  float* grad_weight;         // [num_classes, channels]
  float* grad_bias;
};

// Rows [row, row_end) of images [image, image + images), each [height, width], in the passes of
// upsample_conv.cpp, few_outputs_conv.cpp and norm_strip.cpp. float32 or bfloat16.
struct Strip {
  Dtype dtype;
  int64_t batch, height, width, image, images, row, row_end;
  int64_t rows() const { return row_end - row; }
  int64_t first_difference() const { return row ? row + 1 : 0; }
  int64_t differences() const { return row_end + 1 - first_difference(); }
};

struct UpsampleDifferences {
  Strip strip;
  int64_t channels;
  const void* x;  // all images, NHWC, as every full tensor here
  void* row;      // [images, differences, width, channels]
  void* column;   // [images, rows, width + 1, channels]
  void* mixed;    // [images, differences, width + 1, channels]
};

struct UpsampleSum {
  Strip strip;
  int64_t channels;
  const void* x;       // [images, rows, width, channels]
  const void* row;     // [images, rows + 1, width, 2, channels]
  const void* column;  // [images, rows, width + 1, 2, channels]
  const void* mixed;   // [images, rows + 1, width + 1, 4, channels]
  const float* bias;   // [channels]
  void* y;
};

// Gradients of the products, laid out like UpsampleSum's but for `differences` rows of row, mixed.
struct UpsampleReduce {
  Strip strip;
  int64_t channels;
  const void* grad_y;
  void *x, *row, *column, *mixed;
  float* sum;  // [images, rows, channels]: sums of grad_y that were not rounded to its dtype
};

// Gradients of x and of the maps, laid out like UpsampleDifferences' but for rows + 1 rows of row
// and mixed.
struct UpsampleAdjoint {
  Strip strip;
  int64_t channels;
  const void *x, *row, *column, *mixed;
  void* grad_x;
};

struct GatherTaps {
  Strip strip;
  int64_t channels;
  const void* grad_y;
  void* planes;  // [9, channels, images, rows, width]
};

// total[k] += parts[0][k] + parts[1][k] + ...
struct AddParts {
  int64_t count, size;
  const void* parts;  // bfloat16 [count, size]
  float* total;       // [size]
};
struct SumTaps {
  Strip strip;
  int64_t channels;
  const void* planes;  // [9, channels, images, rows and those above and below, width]
  const float* bias;   // [channels]
  void* y;
};

// Batch norm on given statistics, and LeakyReLU: values [images, channels].
struct NormTables {
  const float *mean, *scale, *bias;
  float negative_slope;
};

// y = leaky_relu((x - mean) * scale + bias), the tables [N, channels] with a row per image.
struct NormStrip {
  Strip strip;
  int64_t channels;
  const void* x;  // all images
  NormTables tables;
  void* y;  // [images, rows, width, channels]
};

// Also adds up g, the gradient before the activation, and g * (x - mean).
struct NormStripSums {
  NormStrip forward;
  const void* grad_y;      // laid out like y
  double *sum_g, *sum_gx;  // [N, channels], added to
};

// g * scale - (shift + (x - mean) * slope): of batch norm, shift and slope as its statistics need.
struct NormStripGradient {
  NormStrip forward;   // `y` receives the gradient with respect to x, of all images
  const void* grad_y;  // [images, rows, width, channels]
  const float *shift, *slope;
};

// A 3x3 convolution with few output channels behind a norm.
struct NormFewOutputs {
  NormStrip norm;  // of all images
  int64_t outputs;
  const void* grad_y;  // [N, H, W, outputs]
  const void* taps;    // [9, outputs, channels]
};

struct NormFewOutputsSums {
  NormFewOutputs forward;
  double* sums;      // [2, N, channels], those of NormStripSums
  float* grad_taps;  // [9, outputs, channels]; both are added to
};

struct NormFewOutputsGradient {
  NormFewOutputs forward;  // norm.y receives the gradient with respect to x
  const float *shift, *slope;
};

// Tiles [tile, tile_end), numbered row by row, image by image, of images [height, width, channels],
// to or from positions or products; see winograd.cpp and winograd_upsample.cpp.
struct WinogradTiles {
  int64_t images, height, width, channels, tile, tile_end;
  const float* from;
  float* to;
};

// What the tiles become in `to` goes through a norm.
struct WinogradNormTiles {
  WinogradTiles tiles;
  NormTables tables;
};

// An up-sampling convolution and a norm of its outputs, by Winograd's algorithm in one pass.
struct UpsampleNorm {
  int64_t images, height, width, inputs, outputs;  // height and width of x
  const float* x;                                  // [images, height, width, inputs]
  const float* weights;                            // packed by winograd_upsample_panels
  NormTables tables;                               // the mean less the convolution's bias
  float* y;                                        // [images, 2 * height, 2 * width, outputs]
};

// The same, and a convolution to few channels: y is [images, 2 * height, 2 * width, channels].
struct UpsampleNormTaps {
  UpsampleNorm norm;
  int64_t channels;
  const float* taps;  // [9, channels, outputs]
  const float* bias;  // [channels]
};

// Also adds up the pixels of every tile.
struct WinogradGradientTiles {
  WinogradTiles tiles;
  double* sums;  // [tiles, channels]
};

// Filters [filters, 3, 3, channels] to [36 positions or 81 products, filters, channels], or
// gradients back.
struct WinogradWeights {
  int64_t filters, channels;
  bool rotated;  // by half a turn, for the gradient of x; of winograd.cpp only
  const float* from;
  float* to;
};

// Padding and stride 1; both channels a multiple of 32. Images: NHWC; filters: OHWI.
struct Conv3x3Shape {
  int64_t images, height, width, inputs, outputs;
};

// Behind nearest x2 up-sampling or not; see winograd_bfloat16.h.
struct WinogradBFloat16 {
  Conv3x3Shape shape;  // of what is not up-sampled
  const void* x;       // bfloat16
  Dtype weight_dtype;
  const void* weight;
  bool rotated;       // by half a turn, inputs and outputs exchanged: x is grad_y, y is grad_x
  const float* bias;  // [outputs], or null
  void* y;            // bfloat16
};

struct WinogradBFloat16Gradient {
  Conv3x3Shape shape;
  const void *grad_y, *x;  // bfloat16
  float* grad_weight;
  double* grad_bias;  // [outputs], added to, or null
};

struct Kernels {
  void (*fake_quantize)(const FakeQuantize&);
  void (*fake_quantize_backward)(const FakeQuantizeBackward&);
  void (*fake_quantize_range)(const FakeQuantizeRange&);
  void (*fake_quantize_range_backward)(const FakeQuantizeRangeBackward&);
  void (*observe_range)(const ObserveRange&);
  void (*bn_relu_fake_quantize)(const BnReluFakeQuantize&);
  void (*bn_relu_fake_quantize_backward)(const BnReluFakeQuantizeBackward&);
  void (*class_moments)(const ClassMoments&);
  void (*class_moments_backward)(const ClassMomentsBackward&);
  void (*quantize)(const Quantize&);
  void (*requantize_codes)(const RequantizeCodes&);
  void (*max_pool)(const MaxPool&);
  void (*sum_pool)(const SumPool&);
  void (*pack_weight)(const PackWeight&);
  void (*unpack_weight)(const UnpackWeight&);
  const char* (*packed_conv2d)(const PackedConv&);  // returns the name of what ran
  void (*packed_linear_s32)(const PackedLinearS32&);
  void (*conditional_bn)(const ConditionalBn&);
  void (*conditional_bn_backward)(const ConditionalBnBackward&);
  void (*upsample_differences)(const UpsampleDifferences&);
  void (*upsample_sum)(const UpsampleSum&);
  void (*upsample_reduce)(const UpsampleReduce&);
  void (*upsample_adjoint)(const UpsampleAdjoint&);
  void (*gather_taps)(const GatherTaps&);
  void (*sum_taps)(const SumTaps&);
  void (*add_parts)(const AddParts&);
  void (*norm_strip)(const NormStrip&);
  void (*norm_strip_sums)(const NormStripSums&);
  void (*norm_strip_gradient)(const NormStripGradient&);
  void (*norm_few_outputs_sums)(const NormFewOutputsSums&);
  void (*norm_few_outputs_gradient)(const NormFewOutputsGradient&);
  void (*products)(const Products&);
  void (*product_bfloat16)(const ProductBFloat16&);
  void (*linear_maps)(const LinearMaps&);
  void (*linear_maps_gradient)(const LinearMapsGradient&);
  void (*max_pool2d)(const MaxPool2d&);
  void (*max_pool2d_gradient)(const MaxPool2dGradient&);
  void (*winograd_input)(const WinogradTiles&);
  void (*winograd_output)(const WinogradTiles&);
  void (*winograd_gradient)(const WinogradTiles&);
  void (*winograd_weights)(const WinogradWeights&);
  void (*winograd_weight_gradient)(const WinogradWeights&);
  void (*winograd_bfloat16)(const WinogradBFloat16&);
  void (*winograd_bfloat16_gradient)(const WinogradBFloat16Gradient&);
  void (*winograd_upsample_bfloat16)(const WinogradBFloat16&);
  void (*winograd_upsample_bfloat16_gradient)(const WinogradBFloat16Gradient&);
  void (*winograd_upsample_input)(const WinogradTiles&);
  void (*winograd_upsample_input_gradient)(const WinogradTiles&);
  void (*winograd_upsample_output)(const WinogradTiles&);
  void (*winograd_upsample_norm_output)(const WinogradNormTiles&);
  void (*winograd_upsample_gradient)(const WinogradGradientTiles&);
  void (*winograd_upsample_weights)(const WinogradWeights&);
  void (*winograd_upsample_weight_gradient)(const WinogradWeights&);
  void (*winograd_upsample_panels)(const WinogradWeights&);
  void (*upsample_norm)(const UpsampleNorm&);
  void (*upsample_norm_taps)(const UpsampleNormTaps&);
};

namespace generic {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
// Packed convolutions in 256-bit VNNI, VEX and EVEX encoded; their other kernels are avx2's.
namespace avxvnni {
const char* packed_conv2d(const PackedConv&);
}
namespace avxvnni_evex {
const char* packed_conv2d(const PackedConv&);
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
// What rounds to bfloat16 and multiplies it by instructions of its own; avx512vnni's otherwise.
namespace avx512bf16 {
void take_bfloat16(Kernels&);
}
// Packed convolutions on tiles; the other kernels are avx512vnni's.
namespace amx {
const char* packed_conv2d(const PackedConv&);
void multiply_tiles(int64_t count);  // products of whole tiles, a multiple of 4 of them
}  // namespace amx

// Instruction sets, lowest first.
struct Isa {
  const char* name;
  const Kernels* kernels;  // null: not compiled
  bool supported;          // by this processor
};
constexpr int kNumIsas = 6;
const Isa* isas();

const Kernels& active_kernels();
// The rung in use.
const char* active_isa();
// Selects `name`, or the best supported rung for null. Returns null, or what is wrong.
const char* select_isa(const char* name);
// Whether `products` in this rung is to be preferred to the framework's.
bool prefers_own_products();
// The same of the convolutions in bfloat16.
bool prefers_own_bfloat16_products();
// Measured on the calling thread, see peak.cpp; 0 for the generic rung.
double peak_macs_per_second();
// Name of the kernel that this thread's last packed_conv2d ran.
const char* last_conv_kernel();

}  // namespace fdda
