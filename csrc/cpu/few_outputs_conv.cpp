// The passes around the matrix products of a 3x3 convolution with few output channels: the narrow
// side, 9 taps times the output channels, lies in planes, [9, channels, pixels], so that both
// passes run along the pixels of a row. Channels of grad_y and y are next to one another.

#include <string.h>

#include "functions.h"
#include "half.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have

// planes[s, t, c, (n, i, j)] = grad_y[n, i - (s - 1), j - (t - 1), c], zero outside.
template <class T>
void run_gather(const GatherTaps& a) {
  const Strip& strip = a.strip;
  const int64_t channels = a.channels, width = strip.width, rows = strip.rows();
  const int64_t pixels = strip.images * rows * width;
  const int64_t padded = width + 2;
  parallel_for(strip.images * rows, max64(1, kGrain / (9 * channels * width)),
               [&](int64_t begin, int64_t end) {
                 T* line = static_cast<T*>(scratch(kLocalRows, channels * padded * sizeof(T)));
                 memset(line, 0, channels * padded * sizeof(T));
                 for (int64_t r = begin; r < end; ++r) {
                   const int64_t n = strip.image + r / rows;
                   for (int64_t s = 0; s < 3; ++s) {
                     const int64_t i = strip.row + r % rows - (s - 1);
                     const bool inside = i >= 0 && i < strip.height;
                     const T* grad = static_cast<const T*>(a.grad_y) +
                                     (n * strip.height + i) * width * channels;
                     for (int64_t c = 0; inside && c < channels; ++c) {
                       for (int64_t j = 0; j < width; ++j)
                         line[c * padded + 1 + j] = grad[j * channels + c];
                     }
                     for (int64_t t = 0; t < 3; ++t) {
                       for (int64_t c = 0; c < channels; ++c) {
                         T* out = static_cast<T*>(a.planes) +
                                  ((s * 3 + t) * channels + c) * pixels + r * width;
                         if (inside) {
                           memcpy(out, line + c * padded + 2 - t, width * sizeof(T));
                         } else {
                           memset(out, 0, width * sizeof(T));
                         }
                       }
                     }
                   }
                 }
               });
}

// y[n, i, j, c] = bias[c] + sum of planes[s, t, c, (n, i + s - 1, j + t - 1)]; the planes have the
// strip's rows and those beside it that exist.
template <class T>
void run_sum(const SumTaps& a) {
  const Strip& strip = a.strip;
  const int64_t channels = a.channels, width = strip.width, rows = strip.rows();
  const int64_t first = max64(0, strip.row - 1);
  const int64_t plane_rows = min64(strip.height, strip.row_end + 1) - first;
  const int64_t pixels = strip.images * plane_rows * width;
  parallel_for(
      strip.images * rows, max64(1, kGrain / (9 * channels * width)),
      [&](int64_t begin, int64_t end) {
        float* __restrict sum = static_cast<float*>(scratch(kLocalRows, width * sizeof(float)));
        for (int64_t r = begin; r < end; ++r) {
          const int64_t n = r / rows, i = strip.row + r % rows;
          T* y = static_cast<T*>(a.y) + ((strip.image + n) * strip.height + i) * width * channels;
          for (int64_t c = 0; c < channels; ++c) {
            for (int64_t j = 0; j < width; ++j) sum[j] = a.bias[c];
            for (int64_t s = 0; s < 3; ++s) {
              const int64_t row = i + s - 1;
              if (row < 0 || row >= strip.height) continue;
              for (int64_t t = 0; t < 3; ++t) {
                const T* __restrict plane = static_cast<const T*>(a.planes) +
                                            ((s * 3 + t) * channels + c) * pixels +
                                            (n * plane_rows + row - first) * width;
                const int64_t last = min64(width, width + 1 - t);
                for (int64_t j = max64(0, 1 - t); j < last; ++j) sum[j] += load(plane[j + t - 1]);
              }
            }
            for (int64_t j = 0; j < width; ++j) store(y[j * channels + c], sum[j]);
          }
        }
      });
}

}  // namespace

void gather_taps(const GatherTaps& a) {
  if (a.strip.dtype == Dtype::kBFloat16) return run_gather<BFloat16>(a);
  run_gather<float>(a);
}

void sum_taps(const SumTaps& a) {
  if (a.strip.dtype == Dtype::kBFloat16) return run_sum<BFloat16>(a);
  run_sum<float>(a);
}

}  // namespace FDDA_ISA
}  // namespace fdda
