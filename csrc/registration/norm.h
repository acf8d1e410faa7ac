// What the operators with a batch norm share: the layout of its input, and the norm folded.
#pragma once

#include <cmath>

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

// `made`, laid out like l.x, in the layout that x's empty_like has.
inline Tensor as_caller(const MomentsLayout& l, const Tensor& x, const Tensor& made) {
  if (!l.copied) return made;
  Tensor out = torch::stable::empty_like(x);
  torch::stable::copy_(out, made);
  return out;
}

// Scale and shift of an eval-mode batch norm, and the clipping behind it.
class FoldedNorm {
 public:
  FoldedNorm(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
             double eps, double low, double high, int64_t channels)
      : scale_(channels),
        shift_(channels),
        inv_std_(channels),
        running_mean_(values(mean, channels, "running_mean")) {
    const Tensor tensors[] = {values(weight, channels, "weight"), values(bias, channels, "bias"),
                              running_mean_, values(var, channels, "running_var")};
    const float* value[4];
    for (int i = 0; i < 4; ++i) value[i] = tensors[i].const_data_ptr<float>();
    for (int64_t c = 0; c < channels; ++c) {
      const double std = std::sqrt(static_cast<double>(value[3][c]) + eps);
      const double scale = value[0][c] / std;
      inv_std_[c] = static_cast<float>(1.0 / std);
      scale_[c] = static_cast<float>(scale);
      shift_[c] = static_cast<float>(value[1][c] - value[2][c] * scale);
    }
    view = {scale_.data(), shift_.data(), static_cast<float>(low), static_cast<float>(high)};
  }
  FoldedNorm(const FoldedNorm&) = delete;

  const float* mean() const { return running_mean_.const_data_ptr<float>(); }
  const float* inv_std() const { return inv_std_.data(); }

  BnRelu view;

 private:
  static Tensor values(const Tensor& t, int64_t channels, const char* argument) {
    check_dtype(t, ScalarType::Float, argument);
    check_numel(t, channels, argument);
    return torch::stable::contiguous(t);
  }

  std::vector<float> scale_, shift_, inv_std_;
  Tensor running_mean_;
};

}  // namespace fdda
