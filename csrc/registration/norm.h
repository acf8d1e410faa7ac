// An eval-mode batch norm as its kernels read it.
#pragma once

#include <cmath>

#include "moments_layout.h"

namespace fdda {

// Scale and shift of an eval-mode batch norm, and the clipping behind it.
class FoldedNorm {
 public:
  FoldedNorm(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
             double eps, double low, double high, int64_t channels)
      : scale_(channels),
        shift_(channels),
        inv_std_(channels),
        running_mean_(float_values(mean, channels, "running_mean")) {
    const Tensor tensors[] = {float_values(weight, channels, "weight"),
                              float_values(bias, channels, "bias"), running_mean_,
                              float_values(var, channels, "running_var")};
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
  std::vector<float> scale_, shift_, inv_std_;
  Tensor running_mean_;
};

}  // namespace fdda
