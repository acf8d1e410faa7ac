// The passes around the matrix products of a 3x3 convolution behind nearest x2 up-sampling.
//
// With x zero outside: R[i, j] = x[i, j] - x[i-1, j], C[i, j] = x[i, j] - x[i, j-1], M = C's R;
// y[2i+p, 2j+q] = X[i, j] + R_p[i+p, j] + C_q[i, j+q] + M_pq[i+p, j+q], where X, R_p, C_q, M_pq are
// products of the maps with 1, 2, 2 and 4 weights. A strip of rows [r0, r1) has r1 - r0 rows of x
// and C and owns the rows (r0, r1] of R and M; the first strip owns row 0, too.

#include <string.h>

#include "functions.h"
#include "parallel.h"
#include "stream.h"
#include "vectors.h"

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

// Differences of rows, and of their neighbours `channels` apart: zero outside, so that a row of
// `length` numbers has `channels` more of the latter.
template <class T>
void row_differences(const T* x, const T* above, int64_t length, int64_t channels, T* row,
                     T* mixed) {
  const auto difference = [=](auto v, int64_t k) {
    using V = decltype(v);
    return load_lanes<V>(x + k) - load_lanes<V>(above + k);
  };
  for_each_vector<T>(channels, [&](auto v, int64_t c) {
    const auto d = difference(v, c);
    store_lanes(row + c, d);
    store_lanes(mixed + c, d);
    store_lanes(mixed + length + c, decltype(v){} - difference(v, length - channels + c));
  });
  for_each_vector<T>(length - channels, [&](auto v, int64_t k) {
    const auto last = difference(v, k), d = difference(v, k + channels);
    prefetch(x + k + channels);
    store_lanes(row + k + channels, d);
    store_lanes(mixed + k + channels, d - last);
  });
}

template <class T>
void column_differences(const T* x, int64_t length, int64_t channels, T* column) {
  for_each_vector<T>(channels, [&](auto v, int64_t c) {
    using V = decltype(v);
    copy_lanes<V>(column + c, x + c);
    store_lanes(column + length + c, V{} - load_lanes<V>(x + length - channels + c));
  });
  for_each_vector<T>(length - channels, [&](auto v, int64_t k) {
    using V = decltype(v);
    store_lanes(column + k + channels, load_lanes<V>(x + k + channels) - load_lanes<V>(x + k));
  });
}

// body(n, i) for the strip's rows of all its images, and for the one below.
template <class Body>
void for_each_row(const Strip& s, int64_t row_size, Body body) {
  const int64_t rows = s.rows() + 1;
  parallel_for(s.images * rows, max64(1, kGrain / row_size), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t / rows, s.row + t % rows);
  });
}

template <class T>
void run_differences(const UpsampleDifferences& a) {
  const Strip& s = a.strip;
  const int64_t length = s.width * a.channels, wide = length + a.channels;
  const T* zeros = zero_row<T>(length);
  for_each_row(s, wide, [&](int64_t n, int64_t i) {
    const T* x = row_or_zeros(a.x, s.image + n, i, s.height, length, zeros);
    if (i >= s.first_difference()) {
      const int64_t d = n * s.differences() + i - s.first_difference();
      row_differences(x, row_or_zeros(a.x, s.image + n, i - 1, s.height, length, zeros), length,
                      a.channels, static_cast<T*>(a.row) + d * length,
                      static_cast<T*>(a.mixed) + d * wide);
    }
    if (i < s.row_end) {
      column_differences(x, length, a.channels,
                         static_cast<T*>(a.column) + (n * s.rows() + i - s.row) * wide);
    }
  });
}

template <class T>
void run_sum(const UpsampleSum& a) {
  const Strip& s = a.strip;
  const int64_t channels = a.channels, width = s.width, rows = s.rows();
  const int64_t out_length = 2 * width * channels, size = sizeof(T);
  const bool stream =
      streams_rows(a.y, s.batch * s.height * 2 * out_length * size, channels * size);
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
              const T* x = x_row + j * channels;
              const T* row = row_row + j * 2 * channels;
              for (int64_t q = 0; q < 2; ++q) {
                const T* column = column_row + ((j + q) * 2 + q) * channels;
                const T* mixed = mixed_row + ((j + q) * 4 + q) * channels;
                T* y = y_row + (2 * j + q) * channels;
                for_each_vector<T>(channels, [&](auto v, int64_t c) {
                  using V = decltype(v);
                  const V near = load_lanes<V>(x + c) + load_lanes<V>(row + c);
                  const V far = load_lanes<V>(column + c) + load_lanes<V>(mixed + c);
                  write_lanes(stream, y + c, near + far + load_lanes<V>(a.bias + c));
                });
              }
            }
          }
        }
        if (stream) stream_fence();
      });
}

// What a row of grad_y gives to the products of the row and the mixed differences: two weights side
// by side in `row`, four in `mixed`.
template <class T>
void reduce_row(const T* grad, int64_t width, int64_t channels, T* row, T* mixed) {
  for (int64_t j = 0; j < width; ++j) {
    const T *even = grad + 2 * j * channels, *odd = even + channels;
    T *sum = row + j * 2 * channels, *mixed0 = mixed + j * 4 * channels;
    T* mixed1 = mixed0 + 5 * channels;
    for_each_vector<T>(channels, [&](auto v, int64_t c) {
      using V = decltype(v);
      prefetch(even + c);
      prefetch(odd + c);
      store_lanes(sum + c, load_lanes<V>(even + c) + load_lanes<V>(odd + c));
      copy_lanes<V>(mixed0 + c, even + c);
      copy_lanes<V>(mixed1 + c, odd + c);
    });
  }
  memset(mixed + channels, 0, channels * sizeof(T));
  memset(mixed + width * 4 * channels, 0, channels * sizeof(T));
}

// What the rows 2i and 2i + 1 of grad_y give to the products of x and of its column differences.
template <class T>
void reduce_rows(const T* grad, int64_t width, int64_t channels, T* x, T* column, float* sum) {
  const int64_t length = 2 * width * channels;
  memset(sum, 0, channels * sizeof(float));
  for (int64_t j = 0; j < width; ++j) {
    const T *even = grad + 2 * j * channels, *odd = even + channels;
    T *total = x + j * channels, *column0 = column + j * 2 * channels;
    T* column1 = column0 + 3 * channels;
    for_each_vector<T>(channels, [&](auto v, int64_t c) {
      using V = decltype(v);
      const V evens = load_lanes<V>(even + c) + load_lanes<V>(even + length + c);
      const V odds = load_lanes<V>(odd + c) + load_lanes<V>(odd + length + c);
      store_lanes(column0 + c, evens);
      store_lanes(column1 + c, odds);
      store_lanes(total + c, evens + odds);
      store_lanes(sum + c, load_lanes<V>(sum + c) + (evens + odds));
    });
  }
  memset(column + channels, 0, channels * sizeof(T));
  memset(column + width * 2 * channels, 0, channels * sizeof(T));
}

// Of output rows 2i + p, those that read R[i] are 2i and 2i - 1.
template <class T>
void run_reduce(const UpsampleReduce& a) {
  const Strip& s = a.strip;
  const int64_t channels = a.channels, width = s.width;
  const int64_t first = s.first_difference(), length = 2 * width * channels;
  const T* zeros = zero_row<T>(length);
  for_each_row(s, 2 * length, [&](int64_t n, int64_t i) {
    const auto reduce = [&](int64_t difference, int64_t p) {
      const int64_t d = n * s.differences() + difference - first;
      reduce_row(
          row_or_zeros(a.grad_y, s.image + n, 2 * difference - p, 2 * s.height, length, zeros),
          width, channels, static_cast<T*>(a.row) + (d * width * 2 + p) * channels,
          static_cast<T*>(a.mixed) + (d * (width + 1) * 4 + 2 * p) * channels);
    };
    if (i == 0) reduce(0, 1);
    if (i >= first) reduce(i, 0);
    if (i == s.row_end) return;
    reduce(i + 1, 1);
    const int64_t r = n * s.rows() + i - s.row;
    reduce_rows(static_cast<const T*>(a.grad_y) + ((s.image + n) * s.height + i) * 2 * length,
                width, channels, static_cast<T*>(a.x) + r * width * channels,
                static_cast<T*>(a.column) + r * (width + 1) * 2 * channels, a.sum + r * channels);
  });
}

template <class T>
void run_adjoint(const UpsampleAdjoint& a) {
  const Strip& s = a.strip;
  const int64_t channels = a.channels, rows = s.rows();
  const int64_t length = s.width * channels, wide = length + channels, size = sizeof(T);
  const bool stream = streams_rows(a.grad_x, s.batch * s.height * length * size, length * size);
  parallel_for(s.images * rows, max64(1, kGrain / length), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / rows, i = t % rows, d = n * (rows + 1) + i;
      const T* x = static_cast<const T*>(a.x) + t * length;
      const T* row = static_cast<const T*>(a.row) + d * length;
      const T* column = static_cast<const T*>(a.column) + t * wide;
      const T* mixed = static_cast<const T*>(a.mixed) + d * wide;
      T* out = static_cast<T*>(a.grad_x) + ((s.image + n) * s.height + s.row + i) * length;
      for_each_vector<T>(length, [&](auto v, int64_t k) {
        using V = decltype(v);
        const auto below = [&](const T* m, int64_t step) {
          return load_lanes<V>(m + k) - load_lanes<V>(m + k + step);
        };
        const V mixed_part = below(mixed, wide) - below(mixed + channels, wide);
        const V rows_part = below(row, length), columns_part = below(column, channels);
        const V sum = (load_lanes<V>(x + k) + mixed_part) + (rows_part + columns_part);
        write_lanes(stream, out + k, sum);
      });
    }
    if (stream) stream_fence();
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
