#include "pools.h"

#include "loop.h"
#include "ptx.h"

namespace fdda {
namespace cuda {
namespace {

// Word: of so many channels as it has bytes.
template <typename Word>
__global__ void __launch_bounds__(kThreads) max_pool_kernel(MaxPool a, int64_t count) {
  const PoolShape& s = a.shape;
  const int64_t words = s.channels / sizeof(Word);
  for_each(count, [&](int64_t i) {
    const int64_t pixel = i / words;
    const int64_t top = pixel / s.out_width % s.out_height * s.stride_h - s.pad_h;
    const int64_t left = pixel % s.out_width * s.stride_w - s.pad_w;
    const uint8_t* image =
        a.x + pixel / s.out_width / s.out_height * s.height * s.width * s.channels;
    uint32_t most = 0;
    for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
      const int64_t y = top + kh * s.dilation_h;
      if (y < 0 || y >= s.height) continue;
      for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
        const int64_t x = left + kw * s.dilation_w;
        if (x < 0 || x >= s.width) continue;
        const uint8_t* source = image + (y * s.width + x) * s.channels;
        most = ptx::max_bytes(most, reinterpret_cast<const Word*>(source)[i % words]);
      }
    }
    reinterpret_cast<Word*>(a.out)[i] = static_cast<Word>(most);
  });
}

// A block has 32 channels of an image; its warps share the pixels.
constexpr int kWarps = kThreads / kLanes;

__global__ void __launch_bounds__(kThreads) sum_pool_kernel(SumPool a, int64_t channel_blocks) {
  __shared__ int32_t sums[kWarps][kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t n = blockIdx.x / channel_blocks;
  const int64_t c = blockIdx.x % channel_blocks * kLanes + lane;
  int32_t sum = 0;
  if (c < a.channels) {
    for (int64_t p = warp; p < a.pixels; p += kWarps) {
      sum += a.x[(n * a.pixels + p) * a.channels + c];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= a.channels) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  a.out[n * a.channels + c] = sum;
}

}  // namespace

void max_pool(const MaxPool& a, cudaStream_t stream) {
  const PoolShape& s = a.shape;
  const int64_t count = s.batch * s.out_height * s.out_width * s.channels;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.out);
  if (s.channels % 4 || addresses % 4) {
    return launch_for_each(max_pool_kernel<uint8_t>, count, stream, a, count);
  }
  launch_for_each(max_pool_kernel<uint32_t>, count / 4, stream, a, count / 4);
}

void sum_pool(const SumPool& a, cudaStream_t stream) {
  const int64_t channel_blocks = ceil_div(a.channels, kLanes);
  const int64_t blocks = a.batch * channel_blocks;
  if (blocks == 0) return;
  launch(sum_pool_kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, a, channel_blocks);
}

}  // namespace cuda
}  // namespace fdda
