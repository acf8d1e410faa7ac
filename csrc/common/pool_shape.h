// The geometry of the pooling operators.
#pragma once

#include <tuple>

#include "checks.h"
#include "codes.h"

namespace fdda {

// x: [N, H, W, C].
inline PoolShape pool_shape(const Tensor& x, const std::vector<int64_t>& kernel_size,
                            const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                            const std::vector<int64_t>& dilation, bool ceil_mode) {
  STD_TORCH_CHECK(x.dim() == 4, "x: expected [N, H, W, C], got ", x.dim(), " dimensions");
  PoolShape s{};
  s.batch = x.size(0);
  s.height = x.size(1);
  s.width = x.size(2);
  s.channels = x.size(3);
  std::tie(s.kernel_h, s.kernel_w) = std::tuple_cat(pair(kernel_size, "kernel_size"));
  std::tie(s.stride_h, s.stride_w) = std::tuple_cat(pair(stride, "stride"));
  std::tie(s.pad_h, s.pad_w) = std::tuple_cat(pair(padding, "padding"));
  std::tie(s.dilation_h, s.dilation_w) = std::tuple_cat(pair(dilation, "dilation"));
  STD_TORCH_CHECK(2 * s.pad_h <= s.kernel_h && 2 * s.pad_w <= s.kernel_w,
                  "padding: expected at most half of kernel_size, got ", s.pad_h, " and ", s.pad_w);
  s.out_height = output_extent(s.height, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, ceil_mode);
  s.out_width = output_extent(s.width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, ceil_mode);
  return s;
}

}  // namespace fdda
