#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>

namespace fdda {
namespace {

enum Kind : int64_t { kQuantize, kRequantize, kMaxPool, kSumPool, kConv, kLinearSums };

class Reader {
 public:
  explicit Reader(const std::vector<int64_t>& words) : words_(words) {}

  bool done() const { return at_ == words_.size(); }

  int64_t next() {
    if (done()) throw std::invalid_argument("program: ends within an instruction");
    return words_[at_++];
  }

  float number() {
    const uint32_t bits = static_cast<uint32_t>(next());
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  void read(std::initializer_list<int64_t*> values) {
    for (int64_t* value : values) *value = next();
  }

  void read(std::initializer_list<float*> values) {
    for (float* value : values) *value = number();
  }

  template <class T>
  T* address() {
    return reinterpret_cast<T*>(static_cast<intptr_t>(next()));
  }

 private:
  const std::vector<int64_t>& words_;
  size_t at_ = 0;
};

Quantize decode_quantize(Reader& r) {
  Quantize a{};
  a.x = r.address<const float>();
  a.out = r.address<uint8_t>();
  r.read({&a.batch, &a.channels, &a.height, &a.width, &a.stride_n, &a.stride_c, &a.stride_h,
          &a.stride_w});
  a.scale = r.number();
  a.zero_point = r.number();
  a.bits = static_cast<int>(r.next());
  return a;
}

RequantizeCodes decode_requantize(Reader& r) {
  RequantizeCodes a{};
  a.x = r.address<const uint8_t>();
  a.out = r.address<uint8_t>();
  a.count = r.next();
  r.read({&a.x_scale, &a.x_zero_point, &a.scale, &a.zero_point});
  a.bits = static_cast<int>(r.next());
  return a;
}

MaxPool decode_max_pool(Reader& r) {
  MaxPool a{};
  a.x = r.address<const uint8_t>();
  a.out = r.address<uint8_t>();
  PoolShape& s = a.shape;
  r.read({&s.batch, &s.height, &s.width, &s.channels, &s.out_height, &s.out_width, &s.kernel_h,
          &s.kernel_w, &s.stride_h, &s.stride_w, &s.pad_h, &s.pad_w, &s.dilation_h, &s.dilation_w});
  return a;
}

SumPool decode_sum_pool(Reader& r) {
  SumPool a{};
  a.x = r.address<const uint8_t>();
  a.out = r.address<int32_t>();
  r.read({&a.batch, &a.pixels, &a.channels});
  return a;
}

Epilogue decode_epilogue(Reader& r) {
  Epilogue e{};
  e.multiplier = r.address<const float>();
  e.bias = r.address<const float>();
  e.residual_u8 = r.address<const uint8_t>();
  e.residual_f32 = r.address<const float>();
  e.residual_scale = r.number();
  e.out_u8 = r.address<uint8_t>();
  e.out_f32 = r.address<float>();
  e.lo = r.number();
  e.hi = r.number();
  return e;
}

PackedConv decode_conv(Reader& r) {
  PackedConv a{};
  a.x = r.address<const uint8_t>();
  a.weight = r.address<const uint8_t>();
  a.weight_offset = r.address<const int64_t>();
  r.read({&a.batch, &a.height, &a.width, &a.channels, &a.out_channels, &a.out_height, &a.out_width,
          &a.kernel_h, &a.kernel_w, &a.stride_h, &a.stride_w, &a.pad_h, &a.pad_w, &a.dilation_h,
          &a.dilation_w, &a.groups});
  a.bits = static_cast<int>(r.next());
  a.x_zero_point = static_cast<int32_t>(r.next());
  a.weight_fits_s8 = r.next() != 0;
  a.epilogue = decode_epilogue(r);
  return a;
}

PackedLinearS32 decode_linear(Reader& r) {
  PackedLinearS32 a{};
  a.x = r.address<const int32_t>();
  a.weight = r.address<const uint8_t>();
  a.weight_offset = r.address<const int64_t>();
  r.read({&a.rows, &a.depth, &a.out_features});
  a.bits = static_cast<int>(r.next());
  a.x_zero_point = r.next();
  a.epilogue = decode_epilogue(r);
  return a;
}

// Addresses of a step that may stand for inputs of a run.
template <class Step, class Visit>
void visit_sources(Step& a, Visit visit) {
  visit(a.x);
  if constexpr (std::is_same_v<Step, PackedConv> || std::is_same_v<Step, PackedLinearS32>) {
    visit(a.epilogue.residual_u8);
    visit(a.epilogue.residual_f32);
  }
}

const char* run_step(const Quantize& a) { return active_kernels().quantize(a), "quantize"; }
const char* run_step(const RequantizeCodes& a) {
  return active_kernels().requantize_codes(a), "requantize";
}
const char* run_step(const MaxPool& a) { return active_kernels().max_pool(a), "max_pool"; }
const char* run_step(const SumPool& a) { return active_kernels().sum_pool(a), "sum_pool"; }
const char* run_step(const PackedConv& a) { return active_kernels().packed_conv2d(a); }
const char* run_step(const PackedLinearS32& a) {
  return active_kernels().packed_linear_s32(a), "linear_s32";
}

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Program::Program(const std::vector<int64_t>& words) {
  Reader r(words);
  while (!r.done()) {
    switch (r.next()) {
      case kQuantize: steps_.push_back(decode_quantize(r)); break;
      case kRequantize: steps_.push_back(decode_requantize(r)); break;
      case kMaxPool: steps_.push_back(decode_max_pool(r)); break;
      case kSumPool: steps_.push_back(decode_sum_pool(r)); break;
      case kConv: steps_.push_back(decode_conv(r)); break;
      case kLinearSums: steps_.push_back(decode_linear(r)); break;
      default: throw std::invalid_argument("program: unknown instruction");
    }
  }
  for (Step& step : steps_) {
    std::visit(
        [&](auto& a) {
          visit_sources(a, [&](auto& source) {
            const intptr_t at = reinterpret_cast<intptr_t>(source);
            if (at < 0) inputs_ = std::max(inputs_, static_cast<size_t>(-at));
          });
        },
        step);
  }
}

void Program::run(const std::vector<const void*>& inputs, double* seconds,
                  std::vector<const char*>* kernels) const {
  if (inputs.size() < inputs_) throw std::invalid_argument("program: inputs are missing");
  for (size_t i = 0; i < steps_.size(); ++i) {
    Step step = steps_[i];
    const double start = seconds ? now() : 0.0;
    const char* kernel = std::visit(
        [&](auto& a) {
          visit_sources(a, [&](auto& source) {
            const intptr_t at = reinterpret_cast<intptr_t>(source);
            if (at < 0) source = static_cast<std::decay_t<decltype(source)>>(inputs[-1 - at]);
          });
          return run_step(a);
        },
        step);
    if (seconds) seconds[i] = now() - start;
    if (kernels) kernels->push_back(kernel);
  }
}

}  // namespace fdda
