// The passes around the matrix products of a 3x3 convolution behind nearest x2 up-sampling.
//
// With x zero outside: R[i, j] = x[i, j] - x[i-1, j], C[i, j] = x[i, j] - x[i, j-1], M = C's R;
// y[2i+p, 2j+q] = X[i, j] + R_p[i+p, j] + C_q[i, j+q] + M_pq[i+p, j+q], where X, R_p, C_q, M_pq are
// products of the maps with 1, 2, 2 and 4 weights. A strip of rows [r0, r1) has r1 - r0 rows of x
// and C and owns the rows (r0, r1] of R and M; the first strip owns row 0, too.

#include <string.h>

#include "functions.h"
#include "half.h"
#include "parallel.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

constexpr int64_t kGrain = 16384;  // elements a thread should have

// Row `row` of image `n` of a dense [images, height, length] array; `zeros` outside.
template <class T>
const T* row_or_zeros(const void* base, int64_t n, int64_t row, int64_t height, int64_t length,
                      const T* zeros) {
  if (row < 0 || row >= height) return zeros;
  return static_cast<const T*>(base) + (n * height + row) * length;
}

template <class T>
const T* zero_row(int64_t length) {
  void* zeros = scratch(kLocalRows, length * sizeof(T));
  memset(zeros, 0, length * sizeof(T));
  return static_cast<const T*>(zeros);
}

// Differences of neighbours `channels` apart, zero outside: `width` pixels in, one more out.
template <class T, class Load>
void difference_row(T* __restrict out, int64_t width, int64_t channels, Load value) {
  const int64_t length = width * channels;
  for (int64_t c = 0; c < channels; ++c) store(out[c], value(c));
#pragma GCC ivdep
  for (int64_t k = channels; k < length; ++k) store(out[k], value(k) - value(k - channels));
  for (int64_t c = length; c < length + channels; ++c) store(out[c], -value(c - channels));
}

template <class T>
void run_differences(const UpsampleDifferences& a) {
  const Strip& s = a.strip;
  const int64_t length = s.width * a.channels, wide = length + a.channels;
  const int64_t first = s.first_difference(), differences = s.differences(), rows = s.rows();
  parallel_for(s.images * differences, max64(1, kGrain / wide), [&](int64_t begin, int64_t end) {
    const T* zeros = zero_row<T>(length);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / differences, i = first + t % differences;
      const T* __restrict x = row_or_zeros(a.x, s.image + n, i, s.height, length, zeros);
      const T* __restrict above = row_or_zeros(a.x, s.image + n, i - 1, s.height, length, zeros);
      T* __restrict out = static_cast<T*>(a.row) + t * length;
      for (int64_t k = 0; k < length; ++k) store(out[k], load(x[k]) - load(above[k]));
      difference_row(static_cast<T*>(a.mixed) + t * wide, s.width, a.channels,
                     [=](int64_t k) { return load(x[k]) - load(above[k]); });
    }
  });
  parallel_for(s.images * rows, max64(1, kGrain / wide), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* __restrict x = static_cast<const T*>(a.x) +
                              ((s.image + t / rows) * s.height + s.row + t % rows) * length;
      difference_row(static_cast<T*>(a.column) + t * wide, s.width, a.channels,
                     [=](int64_t k) { return load(x[k]); });
    }
  });
}

template <class T>
void run_sum(const UpsampleSum& a) {
  const Strip& s = a.strip;
  const int64_t channels = a.channels, width = s.width, rows = s.rows();
  const int64_t out_length = 2 * width * channels;
  parallel_for(
      s.images * rows, max64(1, kGrain / (2 * out_length)), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t n = t / rows, i = t % rows;
          const T* x_row = static_cast<const T*>(a.x) + t * width * channels;
          const T* column_row = static_cast<const T*>(a.column) + t * (width + 1) * 2 * channels;
          for (int64_t p = 0; p < 2; ++p) {
            const int64_t d = n * (rows + 1) + i + p;
            const T* row_row = static_cast<const T*>(a.row) + (d * width * 2 + p) * channels;
            const T* mixed_row =
                static_cast<const T*>(a.mixed) + (d * (width + 1) * 4 + 2 * p) * channels;
            T* y_row = static_cast<T*>(a.y) +
                       (((s.image + n) * s.height + s.row + i) * 2 + p) * out_length;
            for (int64_t j = 0; j < width; ++j) {
              const T* __restrict x = x_row + j * channels;
              const T* __restrict row = row_row + j * 2 * channels;
              for (int64_t q = 0; q < 2; ++q) {
                const T* __restrict column = column_row + ((j + q) * 2 + q) * channels;
                const T* __restrict mixed = mixed_row + ((j + q) * 4 + q) * channels;
                T* __restrict y = y_row + (2 * j + q) * channels;
#pragma GCC ivdep
                for (int64_t c = 0; c < channels; ++c) {
                  store(y[c], (load(x[c]) + load(row[c])) + (load(column[c]) + load(mixed[c])) +
                                  a.bias[c]);
                }
              }
            }
          }
        }
      });
}

template <class T>
void run_reduce(const UpsampleReduce& a) {
  const Strip& s = a.strip;
  const int64_t channels = a.channels, width = s.width, rows = s.rows();
  const int64_t first = s.first_difference(), differences = s.differences();
  const int64_t length = 2 * width * channels;
  parallel_for(
      s.images * differences, max64(1, kGrain / (2 * length)), [&](int64_t begin, int64_t end) {
        const T* zeros = zero_row<T>(length);
        for (int64_t t = begin; t < end; ++t) {
          const int64_t n = s.image + t / differences, i = first + t % differences;
          // Rows 2i and 2i - 1 of grad_y: of output rows i + p, those that read R[i].
          for (int64_t p = 0; p < 2; ++p) {
            const T* grad = row_or_zeros(a.grad_y, n, 2 * i - p, 2 * s.height, length, zeros);
            T* row_out = static_cast<T*>(a.row) + (t * width * 2 + p) * channels;
            T* mixed_out = static_cast<T*>(a.mixed) + (t * (width + 1) * 4 + 2 * p) * channels;
            for (int64_t j = 0; j < width; ++j) {
              const T* __restrict even = grad + 2 * j * channels;
              const T* __restrict odd = even + channels;
              T* __restrict row = row_out + j * 2 * channels;
              T* __restrict mixed0 = mixed_out + j * 4 * channels;
              T* __restrict mixed1 = mixed_out + ((j + 1) * 4 + 1) * channels;
#pragma GCC ivdep
              for (int64_t c = 0; c < channels; ++c) {
                store(row[c], load(even[c]) + load(odd[c]));
                mixed0[c] = even[c];
                mixed1[c] = odd[c];
              }
            }
            memset(mixed_out + channels, 0, channels * sizeof(T));
            memset(mixed_out + width * 4 * channels, 0, channels * sizeof(T));
          }
        }
      });
  parallel_for(s.images * rows, max64(1, kGrain / (2 * length)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = s.image + t / rows, i = s.row + t % rows;
      const T* upper = static_cast<const T*>(a.grad_y) + (n * s.height + i) * 2 * length;
      T* x_out = static_cast<T*>(a.x) + t * width * channels;
      T* column_out = static_cast<T*>(a.column) + t * (width + 1) * 2 * channels;
      float* __restrict sum = a.sum + t * channels;
      memset(sum, 0, channels * sizeof(float));
      for (int64_t j = 0; j < width; ++j) {
        const T* __restrict even0 = upper + 2 * j * channels;
        const T* __restrict even1 = even0 + length;
        const T* __restrict odd0 = even0 + channels;
        const T* __restrict odd1 = even1 + channels;
        T* __restrict x = x_out + j * channels;
        T* __restrict column0 = column_out + j * 2 * channels;
        T* __restrict column1 = column_out + ((j + 1) * 2 + 1) * channels;
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
          const float even = load(even0[c]) + load(even1[c]);
          const float odd = load(odd0[c]) + load(odd1[c]);
          store(column0[c], even);
          store(column1[c], odd);
          store(x[c], even + odd);
          sum[c] += even + odd;
        }
      }
      memset(column_out + channels, 0, channels * sizeof(T));
      memset(column_out + width * 2 * channels, 0, channels * sizeof(T));
    }
  });
}

template <class T>
void run_adjoint(const UpsampleAdjoint& a) {
  const Strip& s = a.strip;
  const int64_t channels = a.channels, rows = s.rows();
  const int64_t length = s.width * channels, wide = length + channels;
  parallel_for(s.images * rows, max64(1, kGrain / length), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / rows, i = t % rows, d = n * (rows + 1) + i;
      const T* __restrict x = static_cast<const T*>(a.x) + t * length;
      const T* __restrict row = static_cast<const T*>(a.row) + d * length;
      const T* __restrict column = static_cast<const T*>(a.column) + t * wide;
      const T* __restrict mixed = static_cast<const T*>(a.mixed) + d * wide;
      const T* __restrict below = mixed + wide;
      T* __restrict out =
          static_cast<T*>(a.grad_x) + ((s.image + n) * s.height + s.row + i) * length;
      for (int64_t k = 0; k < length; ++k) {
        const float rows_part = load(row[k]) - load(row[k + length]);
        const float columns_part = load(column[k]) - load(column[k + channels]);
        const float mixed_part = (load(mixed[k]) - load(below[k])) -
                                 (load(mixed[k + channels]) - load(below[k + channels]));
        store(out[k], (load(x[k]) + mixed_part) + (rows_part + columns_part));
      }
    }
  });
}

}  // namespace

void upsample_differences(const UpsampleDifferences& a) {
  if (a.strip.dtype == Dtype::kBFloat16) return run_differences<BFloat16>(a);
  run_differences<float>(a);
}

void upsample_sum(const UpsampleSum& a) {
  if (a.strip.dtype == Dtype::kBFloat16) return run_sum<BFloat16>(a);
  run_sum<float>(a);
}

void upsample_reduce(const UpsampleReduce& a) {
  if (a.strip.dtype == Dtype::kBFloat16) return run_reduce<BFloat16>(a);
  run_reduce<float>(a);
}

void upsample_adjoint(const UpsampleAdjoint& a) {
  if (a.strip.dtype == Dtype::kBFloat16) return run_adjoint<BFloat16>(a);
  run_adjoint<float>(a);
}

void add_parts(const AddParts& a) {
  parallel_for(a.size, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < a.count; ++part) {
      const BFloat16* __restrict values = static_cast<const BFloat16*>(a.parts) + part * a.size;
#pragma GCC ivdep
      for (int64_t k = begin; k < end; ++k) a.total[k] += load(values[k]);
    }
  });
}

}  // namespace FDDA_ISA
}  // namespace fdda
