// Windows of convolutions and pools.
#pragma once

#include "functions.h"

namespace fdda {

// In one dimension: first and one-past-last tap inside [0, size) of a window that starts at
// `start`.
static inline void valid_taps(int64_t start, int64_t size, int64_t kernel, int64_t dilation,
                              int64_t* first, int64_t* end) {
  *first = start < 0 ? min64(kernel, ceil_div(-start, dilation)) : 0;
  *end = start < size ? min64(kernel, ceil_div(size - start, dilation)) : 0;
  *end = max64(*end, *first);
}

// Whether a copy of x with its padding is not much larger than x.
static inline bool padding_is_modest(const PackedConv& conv) {
  return conv.pad_h <= max64(16, conv.height + conv.kernel_h) &&
         conv.pad_w <= max64(16, conv.width + conv.kernel_w);
}

}  // namespace fdda
