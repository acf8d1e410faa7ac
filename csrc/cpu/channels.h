// Walks over a ChannelView: elementwise, and with sums per channel.
#pragma once

#include "functions.h"
#include "parallel.h"
#include "stream.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// Elements a thread takes at least: below this, waking another thread costs more than it saves.
constexpr int64_t kGrain = 16384;

// Calls apply.pixels for rows that run through the channels (inner == 1), else apply.row for rows
// of one channel.
template <class Apply>
void for_each_row(const ChannelView& v, Apply apply) {
  if (v.inner == 1) {
    parallel_for(v.outer, max64(1, kGrain / max64(1, v.channels)), [&](int64_t begin, int64_t end) {
      apply.pixels(begin * v.channels, end - begin, v.channels);
      stream_fence();
    });
  } else if (v.outer * v.channels == 1) {
    parallel_for(v.inner, kGrain, [&](int64_t begin, int64_t end) {
      apply.row(begin, end - begin, 0);
      stream_fence();
    });
  } else {
    parallel_for(v.outer * v.channels, max64(1, kGrain / max64(1, v.inner)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin; r < end; ++r) {
                     apply.row(r * v.inner, v.inner, r % v.channels);
                   }
                   stream_fence();
                 });
  }
}

// channel_sums: make(c)(i, s) sees element i of channel c once and gives K addends s; their sums
// per channel go to sums [K, channels], zeros for an empty view. Of interleaved channels
// add(channel, offset, rows, width, sum) adds those of `width` channels' next `rows` pixels to
// sum [K][kStrip], `offset` being the first element. Two stages: float32 over tiles (at
// most kTileAdds addends a lane), double over tiles. The order of additions depends on the shape
// alone, never on the number of threads.
constexpr int kLanes = 64;
constexpr int64_t kTileAdds = 64;
constexpr int64_t kTile = kLanes * kTileAdds;
constexpr int64_t kStrip = 256;      // channels of an interleaved tile
constexpr int64_t kBlockRows = 512;  // rows of an interleaved block, the unit of parallel work

template <int K, class Element>
void add_row(const Element& element, int64_t offset, int64_t n, float (*lanes)[kLanes]) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma GCC ivdep
    for (int j = 0; j < kLanes; ++j) {
      float s[K];
      element(offset + i + j, s);
      for (int k = 0; k < K; ++k) lanes[k][j] += s[k];
    }
  }
  for (int j = 0; i + j < n; ++j) {
    float s[K];
    element(offset + i + j, s);
    for (int k = 0; k < K; ++k) lanes[k][j] += s[k];
  }
}

template <int K, class Make>
void row_sums(const ChannelView& v, double* sums, Make make) {
  // A piece is one tile of a long row, or as many short rows of a channel as make a tile.
  const int64_t rows = max64(1, kTile / v.inner), tiles = ceil_div(v.inner, kTile);
  const int64_t pieces = ceil_div(v.outer, rows) * v.channels * tiles;
  double* partial = static_cast<double*>(scratch(kSums, pieces * K * sizeof(double)));
  parallel_for(pieces, kGrain / kTile, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t start = p % tiles * kTile;
      const int64_t channel = p / tiles % v.channels;
      const int64_t first = p / tiles / v.channels * rows;
      float lanes[K][kLanes] = {};
      for (int64_t o = first; o < min64(first + rows, v.outer); ++o) {
        add_row<K>(make(channel), (o * v.channels + channel) * v.inner + start,
                   min64(kTile, v.inner - start), lanes);
      }
      for (int k = 0; k < K; ++k) {
        double sum = 0.0;
        for (int j = 0; j < kLanes; ++j) sum += lanes[k][j];
        partial[p * K + k] = sum;
      }
    }
  });
  for (int64_t p = 0; p < pieces; ++p) {
    for (int k = 0; k < K; ++k) sums[k * v.channels + p / tiles % v.channels] += partial[p * K + k];
  }
}

template <int K, class Add>
void interleaved_sums(const ChannelView& v, double* sums, Add add) {
  const int64_t strips = ceil_div(v.channels, kStrip), blocks = ceil_div(v.outer, kBlockRows);
  double* partial = static_cast<double*>(scratch(kSums, blocks * K * v.channels * sizeof(double)));
  parallel_for(blocks * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t block = t / strips, channel = t % strips * kStrip;
      const int64_t width = min64(kStrip, v.channels - channel);
      const int64_t last = min64((block + 1) * kBlockRows, v.outer);
      double total[K][kStrip] = {};
      for (int64_t start = block * kBlockRows; start < last; start += kTileAdds) {
        float sum[K][kStrip];
        for (int k = 0; k < K; ++k) {
          for (int64_t c = 0; c < width; ++c) sum[k][c] = 0.0f;
        }
        add(channel, start * v.channels + channel, min64(kTileAdds, last - start), width, sum);
        for (int k = 0; k < K; ++k) {
          for (int64_t c = 0; c < width; ++c) total[k][c] += sum[k][c];
        }
      }
      for (int k = 0; k < K; ++k) {
        double* out = partial + (block * K + k) * v.channels + channel;
        for (int64_t c = 0; c < width; ++c) out[c] = total[k][c];
      }
    }
    stream_fence();
  });
  for (int64_t b = 0; b < blocks; ++b) {
    const double* block = partial + b * K * v.channels;
    for (int64_t c = 0; c < K * v.channels; ++c) sums[c] += block[c];
  }
}

template <int K, class Make, class Add>
void channel_sums(const ChannelView& v, int64_t channels, double* sums, Make make, Add add) {
  for (int64_t c = 0; c < K * channels; ++c) sums[c] = 0.0;
  if (v.outer * v.channels * v.inner == 0) return;
  if (v.inner == 1) {
    interleaved_sums<K>(v, sums, add);
  } else {
    row_sums<K>(v, sums, make);
  }
}

template <int K, class Make>
void channel_sums(const ChannelView& v, int64_t channels, double* sums, Make make) {
  channel_sums<K>(
      v, channels, sums, make,
      [&](int64_t channel, int64_t offset, int64_t rows, int64_t width, float (*sum)[kStrip]) {
        for (int64_t i = 0; i < rows; ++i, offset += v.channels) {
#pragma GCC ivdep
          for (int64_t c = 0; c < width; ++c) {
            float s[K];
            make(channel + c)(offset + c, s);
            for (int k = 0; k < K; ++k) sum[k][c] += s[k];
          }
        }
      });
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
