// The arithmetic of the CUDA kernels (csrc/common), one loop in place of the grid.
#include "../../csrc/common/packed.h"

using namespace fdda;

// shape: batch, height, width, channels, bits, out_channels, out_height, out_width, kernel (2),
// stride (2), padding (2), dilation (2), groups, x_zero_point
extern "C" void direct_conv(const int64_t* shape, const uint8_t* x, const uint8_t* weight,
                            const int64_t* offset, const float* multiplier, const float* bias,
                            const uint8_t* residual, float residual_scale, float* out_f32,
                            uint8_t* out_u8, float lo, float hi) {
  PackedConv p{};
  p.x = x;
  p.weight = weight;
  p.weight_offset = offset;
  int64_t* const fields[] = {&p.batch, &p.height, &p.width, &p.channels};
  for (int i = 0; i < 4; ++i) *fields[i] = shape[i];
  p.bits = static_cast<int>(shape[4]);
  int64_t* const rest[] = {&p.out_channels, &p.out_height, &p.out_width,  &p.kernel_h,
                           &p.kernel_w,     &p.stride_h,   &p.stride_w,   &p.pad_h,
                           &p.pad_w,        &p.dilation_h, &p.dilation_w, &p.groups};
  for (int i = 0; i < 12; ++i) *rest[i] = shape[5 + i];
  p.x_zero_point = static_cast<int32_t>(shape[17]);
  p.epilogue = {multiplier, bias, residual, nullptr, residual_scale, out_u8, out_f32, lo, hi};
  const int64_t outputs = p.batch * p.out_height * p.out_width * p.out_channels;
  for (int64_t i = 0; i < outputs; ++i) {
    store_output(p.epilogue, i, i % p.out_channels, conv_accumulator(p, i));
  }
}
