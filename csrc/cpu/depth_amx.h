// How tiles walk through the depth of a convolution.
#pragma once

#include "planes_avx512.h"
#include "tiles_amx.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// The depth consists of runs: inputs adjacent in memory, a kernel's row where its taps are
// adjacent, else one tap. A run is cut into equal steps; where it does not divide, the last step
// starts early, and what it repeats weighs 0.
struct Depth {
  int64_t run, runs;   // inputs of a run; how many runs
  int64_t steps;       // of a run
  int64_t step;        // inputs of a step, a multiple of kBlockDepth
  bool taps_adjacent;  // a run is a kernel's row

  static Depth of(const PackedConv& conv) {
    Depth d;
    const int64_t inputs = conv.channels / conv.groups;
    d.taps_adjacent = conv.kernel_w == 1 || (conv.groups == 1 && conv.dilation_w == 1);
    d.run = d.taps_adjacent ? conv.kernel_w * inputs : inputs;
    d.runs = d.taps_adjacent ? conv.kernel_h : conv.kernel_h * conv.kernel_w;
    d.steps = ceil_div(d.run, kLineBytes);
    d.step = ceil_div(ceil_div(d.run, d.steps), kBlockDepth) * kBlockDepth;
    return d;
  }

  int64_t total_steps() const { return runs * steps; }
  int64_t weight_bytes() const { return step * kPanelRows; }
  int64_t panel_bytes() const { return total_steps() * weight_bytes(); }

  // Where step i of a run starts; past the run it reads at most kBlockDepth - 1 inputs.
  int64_t start(int64_t i) const {
    return min64(i * step, ceil_div(run, kBlockDepth) * kBlockDepth - step);
  }
};

// One panel as tiles, [runs][steps][step / 4][16 outputs][4 inputs], and the sums of its channels'
// weights, which are expand(block) + offset. SHIFTED: runs may start and end within a block.
template <bool SHIFTED, class Expand>
void unpack_panel(const Depth d, const Expand expand, __m512i offset, int8_t* panel,
                  int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  const int64_t last_block = ceil_div(d.runs * d.run, kBlockDepth) - 1;
  __m512i sum[2] = {};  // two hide some of vpdpbusd's latency
  auto put = [&](int s, __m512i w) {
    _mm512_store_si512(panel, w);
    panel += kLineBytes;
    sum[s] = _mm512_dpbusd_epi32(sum[s], ones, w);
  };
  for (int64_t run = 0; run < d.runs; ++run) {
    for (int64_t i = 0; i < d.steps; ++i) {
      int64_t k = d.start(i);
      const int64_t end = k + d.step;
      for (; k < i * d.step; k += kBlockDepth) put(0, _mm512_setzero_si512());
      if (SHIFTED) {
        for (; k < end; k += kBlockDepth) {
          const int64_t first = run * d.run + k, block = first / kBlockDepth;
          const __m512i w = _mm512_shrdv_epi32(
              expand(min64(block, last_block)), expand(min64(block + 1, last_block)),
              _mm512_set1_epi32(static_cast<int>(8 * (first % kBlockDepth))));
          const int64_t valid = max64(0, min64(kBlockDepth, d.run - k));
          const __mmask64 mask = ((uint64_t{1} << valid) - 1) * 0x1111111111111111u;
          put(0, _mm512_maskz_add_epi8(mask, w, offset));
        }
      } else {
        int64_t block = (run * d.run + k) / kBlockDepth;
        const int64_t last = (run * d.run + end) / kBlockDepth;
        for (; block + 2 <= last; block += 2) {
          put(0, _mm512_add_epi8(expand(block), offset));
          put(1, _mm512_add_epi8(expand(block + 1), offset));
        }
        if (block < last) put(0, _mm512_add_epi8(expand(block), offset));
      }
    }
  }
  _mm512_storeu_si512(sums, _mm512_add_epi32(sum[0], sum[1]));
}

template <class Expand>
void unpack(const Depth& d, const Expand& expand, __m512i offset, int8_t* panel, int32_t* sums) {
  if (d.run % kBlockDepth) {
    unpack_panel<true>(d, expand, offset, panel, sums);
  } else {
    unpack_panel<false>(d, expand, offset, panel, sums);
  }
}

// The weights of a panel's steps, each expanded kLead steps before it is needed, with a buffer that
// stays in the first cache. Only where a panel's steps are its blocks in order.
class Expanding {
 public:
  Expanding(const Depth& d, const BitMatrices& expand, __m512i offset)
      : expand_(expand), offset_(offset), blocks_(d.step / kBlockDepth), steps_(d.total_steps()) {
    for (int64_t i = 0; i < min64(kLead, steps_); ++i) fill(i);
  }

  static bool applies(const Depth& d) { return d.steps * d.step == d.run; }

  const int8_t* operator()(int64_t step) {
    if (step + kLead < steps_) fill(step + kLead);
    return tile(step);
  }

  // Of the channels' weights, once all steps are done.
  __m512i sums() const { return _mm512_add_epi32(sums_[0], sums_[1]); }

 private:
  static constexpr int64_t kLead = 2, kTiles = 4;

  int8_t* tile(int64_t step) { return tiles_ + step % kTiles * kTileRows * kLineBytes; }

  void fill(int64_t step) {
    // Copies: stores of bytes might change members.
    const BitMatrices expand = expand_;
    const __m512i offset = offset_, ones = _mm512_set1_epi8(1);
    __m512i sums[2] = {sums_[0], sums_[1]};
    const int64_t block = step * blocks_, blocks = blocks_;
    int8_t* out = tile(step);
    auto put = [&](int64_t b, int s) {
      const __m512i w = _mm512_add_epi8(expand(block + b), offset);
      _mm512_store_si512(out + b * kLineBytes, w);
      sums[s] = _mm512_dpbusd_epi32(sums[s], ones, w);
    };
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2) {
      put(b, 0);
      put(b + 1, 1);
    }
    if (b < blocks) put(b, 0);
    sums_[0] = sums[0];
    sums_[1] = sums[1];
  }

  const BitMatrices expand_;
  const __m512i offset_;
  const int64_t blocks_, steps_;
  __m512i sums_[2] = {};
  alignas(kLineBytes) int8_t tiles_[kTiles * kTileRows * kLineBytes];
};

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
