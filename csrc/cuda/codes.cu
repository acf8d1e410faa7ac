#include "codes.h"

#include "../common/packed.h"
#include "loop.h"
#include "ptx.h"

namespace fdda {
namespace cuda {
namespace {

constexpr int kCodes = 256;
static_assert(kThreads == kCodes, "a thread makes one entry of a table");

// Adjacent threads have what is adjacent in x: channels, or else pixels.
__global__ void __launch_bounds__(kThreads) quantize_kernel(Quantize a, int64_t count) {
  const float half = static_cast<float>(1 << (a.bits - 1));
  const int64_t pixels = a.batch * a.height * a.width;
  for_each(count, [&](int64_t i) {
    const bool channels_first = a.stride_c == 1;
    const int64_t c = channels_first ? i % a.channels : i / pixels;
    const int64_t pixel = channels_first ? i / a.channels : i % pixels;
    const int64_t n = pixel / a.width / a.height, y = pixel / a.width % a.height;
    const float x =
        a.x[n * a.stride_n + c * a.stride_c + y * a.stride_h + pixel % a.width * a.stride_w];
    a.out[pixel * a.channels + c] = quantize_code(x, a.scale, a.zero_point, half);
  });
}

// Every block makes its table of all codes: a division a thread.
__device__ void make_table(const RequantizeCodes& a, uint8_t* table) {
  const float value = (static_cast<float>(threadIdx.x) - a.x_zero_point) / a.x_scale;
  const float half = static_cast<float>(1 << (a.bits - 1));
  table[threadIdx.x] = quantize_code(value, a.scale, a.zero_point, half);
  __syncthreads();
}

__device__ uint4 looked_up(const uint8_t* table, uint4 v) {
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
  for (uint32_t& word : words) {
    uint32_t codes = 0;
    for (int j = 0; j < 32; j += 8) codes |= uint32_t{table[word >> j & 255]} << j;
    word = codes;
  }
  return {words[0], words[1], words[2], words[3]};
}

// `wide` accesses of 16 bytes, and the bytes behind them.
__global__ void __launch_bounds__(kThreads) requantize_kernel(RequantizeCodes a, int64_t wide) {
  __shared__ uint8_t table[kCodes];
  make_table(a, table);
  for_each(wide, [&](int64_t i) {
    ptx::store_16(a.out + i * 16, looked_up(table, ptx::load_16(a.x + i * 16)));
  });
  for_each(a.count - wide * 16,
           [&](int64_t i) { a.out[wide * 16 + i] = table[a.x[wide * 16 + i]]; });
}

// 32 codes become 16 bytes, in `wide` accesses or in single bytes.
__global__ void __launch_bounds__(kThreads)
    requantize_packed_kernel(RequantizeCodes a, int64_t wide) {
  __shared__ uint8_t table[kCodes];
  make_table(a, table);
  for_each(wide, [&](int64_t i) {
    const uint4 low = looked_up(table, ptx::load_16(a.x + i * 32));
    const uint4 high = looked_up(table, ptx::load_16(a.x + i * 32 + 16));
    ptx::store_16(a.out + i * 16, {low.x | high.x << 4, low.y | high.y << 4, low.z | high.z << 4,
                                   low.w | high.w << 4});
  });
  for_each(a.count / 2 - wide * 16, [&](int64_t j) {
    const uint8_t* source = a.x + j / 16 * 32 + j % 16;
    a.out[j] = static_cast<uint8_t>(table[source[0]] | table[source[16]] << 4);
  });
}

__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeCodes a) {
  __shared__ float table[kCodes];
  table[threadIdx.x] = (static_cast<float>(threadIdx.x) - a.zero_point) / a.scale;
  __syncthreads();
  for_each(a.count, [&](int64_t i) { a.out[i] = table[a.x[i]]; });
}

__global__ void __launch_bounds__(kThreads) dequantize_sums_kernel(DequantizeSums a) {
  for_each(a.count, [&](int64_t i) {
    a.out[i] = static_cast<float>((static_cast<double>(a.x[i]) - a.zero_point) / a.divisor);
  });
}

bool is_aligned(const RequantizeCodes& a) {
  return (reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.out)) % 16 == 0;
}

}  // namespace

void quantize(const Quantize& a, cudaStream_t stream) {
  const int64_t count = a.batch * a.height * a.width * a.channels;
  launch_for_each(quantize_kernel, count, stream, a, count);
}

void requantize_codes(const RequantizeCodes& a, cudaStream_t stream) {
  const int64_t wide = is_aligned(a) ? a.count / 16 : 0;
  const int64_t narrow = a.count - wide * 16;
  launch_for_each(requantize_kernel, wide > narrow ? wide : narrow, stream, a, wide);
}

void requantize_codes_packed(const RequantizeCodes& a, cudaStream_t stream) {
  const int64_t wide = is_aligned(a) ? a.count / kPackedChannels : 0;
  launch_for_each(requantize_packed_kernel, wide ? wide : a.count / 2, stream, a, wide);
}

void dequantize_codes(const DequantizeCodes& a, cudaStream_t stream) {
  launch_for_each(dequantize_kernel, a.count, stream, a);
}

void dequantize_sums(const DequantizeSums& a, cudaStream_t stream) {
  launch_for_each(dequantize_sums_kernel, a.count, stream, a);
}

}  // namespace cuda
}  // namespace fdda
