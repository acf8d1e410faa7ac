// A packed network's integer operations, decoded once and then run without the framework between
// them.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "cpu/kernels.h"

namespace fdda {

// out[n, h, w, c] = x[n, begin + step * (h, w, c)] of images [sizes], or value where that is
// outside.
struct CopyCodes {
  const uint8_t* x;
  uint8_t* out;
  int64_t batch;
  int64_t sizes[3], out_sizes[3], begin[3], step[3];  // of lines, pixels and channels
  uint8_t value;
};

class Program {
 public:
  // `words`: instructions, each its kind and what `decode` in program.cpp reads for it. Addresses
  // are those of memory that outlives the program; negative ones, -1 - i, stand for input i of a
  // run. Throws std::invalid_argument.
  explicit Program(const std::vector<int64_t>& words);

  size_t size() const { return steps_.size(); }
  size_t inputs() const { return inputs_; }

  // `seconds`, where given, and `kernels` get an entry per instruction.
  void run(const std::vector<const void*>& inputs, double* seconds = nullptr,
           std::vector<const char*>* kernels = nullptr) const;

 private:
  using Step = std::variant<Quantize, RequantizeCodes, MaxPool, SumPool, PackedConv,
                            PackedLinearS32, CopyCodes>;

  std::vector<Step> steps_;
  std::set<size_t> pairs_;  // the first steps of pairs
  int64_t images_ = 0;      // for each of which the first image_steps_ are run
  size_t image_steps_ = 0;
  size_t inputs_ = 0;
};

}  // namespace fdda
