// Tensors and labels of the operators on per-channel moments.
#pragma once

#include "layout.h"

namespace fdda {

struct MomentsLayout {
  Tensor x;
  int64_t batch, channels, inner;
  bool channels_last;
  bool copied;  // x is not the caller's tensor
};

inline MomentsLayout moments_layout(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 4, "x: expected [N, C] or [N, C, H, W], got ", x.dim(),
                  " dimensions");
  MomentsLayout l{x, x.size(0), x.size(1), x.dim() == 4 ? x.size(2) * x.size(3) : 1, false, false};
  const bool nhwc = x.dim() == 4 && x.stride(1) == 1 &&
                    (x.size(3) == 1 || x.stride(3) == l.channels) &&
                    (x.size(2) == 1 || x.stride(2) == x.size(3) * l.channels) &&
                    (x.size(0) == 1 || x.stride(0) == l.inner * l.channels);
  l.copied = !x.is_contiguous() && !nhwc;
  if (l.copied) l.x = torch::stable::contiguous(x);
  // With one pixel the two layouts are one, and channels_last runs along the channels.
  l.channels_last = l.inner == 1 || (nhwc && !x.is_contiguous());
  return l;
}

inline Tensor checked_labels(const Tensor& labels, int64_t batch, int64_t num_classes) {
  check_dtype(labels, ScalarType::Long, "labels");
  check_numel(labels, batch, "labels");
  const Tensor dense_labels = torch::stable::contiguous(labels);
  const int64_t* label = dense_labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch; ++i) {
    STD_TORCH_CHECK(label[i] >= 0 && label[i] < num_classes, "labels: expected 0 to ",
                    num_classes - 1, ", got ", label[i]);
  }
  return dense_labels;
}

// `made`, laid out like l.x, in the layout that x's empty_like has.
inline Tensor as_caller(const MomentsLayout& l, const Tensor& x, const Tensor& made) {
  if (!l.copied) return made;
  Tensor out = torch::stable::empty_like(x);
  torch::stable::copy_(out, made);
  return out;
}

// t in the layout of l.x, which x has the dtype and size of.
inline Tensor companion(const MomentsLayout& l, const Tensor& t, const char* argument) {
  check_dtype(t, l.x.scalar_type(), argument);
  check_numel(t, l.x.numel(), argument);
  return with_strides_of(l.x, t);
}

}  // namespace fdda
