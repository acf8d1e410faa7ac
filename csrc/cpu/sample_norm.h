// Batch norm with values per sample and channel, and LeakyReLU, on vectors of channels.
#pragma once

#include "functions.h"
#include "vectors.h"

namespace fdda {
namespace FDDA_ISA {
namespace {

// Of the channels that V has.
template <class V>
struct ChannelNorm {
  V mean, scale, bias;
  float slope;
  V centered(V x) const { return x - mean; }
  V norm(V centered) const { return centered * scale + bias; }
  V activation(V norm) const { return norm > 0.0f ? norm : norm * slope; }
  V before_activation(V norm, V grad) const { return norm > 0.0f ? grad : grad * slope; }
};

// One sample's row of the tables.
struct Sample {
  const float *mean, *scale, *bias;
  float slope;
  template <class V>
  ChannelNorm<V> from(int64_t c) const {
    return {load_lanes<V>(mean + c), load_lanes<V>(scale + c), load_lanes<V>(bias + c), slope};
  }
};

inline Sample sample_of(const NormTables& a, int64_t channels, int64_t n) {
  return {a.mean + n * channels, a.scale + n * channels, a.bias + n * channels, a.negative_slope};
}

}  // namespace
}  // namespace FDDA_ISA
}  // namespace fdda
