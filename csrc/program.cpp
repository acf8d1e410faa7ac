#include "program.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "cpu/parallel.h"

namespace fdda {
namespace {

// kPair: of the two convolutions that follow, without taps, the second one alone adds the float
// outputs of the first. kEachImage, of a number of images and one of instructions, the first ones:
// a quantisation to a convolution to codes, to be run image by image.
enum Kind : int64_t {
  kQuantize,
  kRequantize,
  kMaxPool,
  kSumPool,
  kConv,
  kLinearSums,
  kPair,
  kEachImage,
  kCopy
};

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

CopyCodes decode_copy(Reader& r) {
  CopyCodes a{};
  a.x = r.address<const uint8_t>();
  a.out = r.address<uint8_t>();
  a.batch = r.next();
  for (int i = 0; i < 3; ++i) r.read({&a.sizes[i], &a.out_sizes[i], &a.begin[i], &a.step[i]});
  a.value = static_cast<uint8_t>(r.next());
  return a;
}

// One pixel's channels.
void copy_channels(const CopyCodes& a, const uint8_t* x, uint8_t* out) {
  const int64_t begin = a.begin[2], count = a.out_sizes[2];
  if (a.step[2] != 1) {  // of a slice: all are inside
    for (int64_t c = 0; c < count; ++c) out[c] = x[begin + c * a.step[2]];
    return;
  }
  const int64_t first = std::clamp<int64_t>(-begin, 0, count);
  const int64_t end = std::clamp<int64_t>(a.sizes[2] - begin, first, count);
  std::memset(out, a.value, first);
  std::memcpy(out + first, x + begin + first, end - first);
  std::memset(out + end, a.value, count - end);
}

void copy_codes(const CopyCodes& a) {
  const int64_t lines = a.out_sizes[0], pixels = a.out_sizes[1], channels = a.out_sizes[2];
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, pixels * channels));
  parallel_for(a.batch * lines, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t line = a.begin[0] + r % lines * a.step[0];
      const bool inside = line >= 0 && line < a.sizes[0];
      const int64_t at = (r / lines * a.sizes[0] + line) * a.sizes[1] * a.sizes[2];
      uint8_t* out = a.out + r * pixels * channels;
      for (int64_t p = 0; p < pixels; ++p, out += channels) {
        const int64_t pixel = a.begin[1] + p * a.step[1];
        if (inside && pixel >= 0 && pixel < a.sizes[1]) {
          copy_channels(a, a.x + at + pixel * a.sizes[2], out);
        } else {
          std::memset(out, a.value, channels);
        }
      }
    }
  });
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
const char* run_step(const CopyCodes& a) { return copy_codes(a), "copy"; }

constexpr int64_t kBlockBytes = int64_t{1} << 18;  // of a pair's float outputs: they stay in L2

// Lines [begin, end) of outputs of one image, of a convolution without taps.
PackedConv lines_of(PackedConv a, int64_t image, int64_t begin, int64_t end) {
  const int64_t pixel = (image * a.height + begin * a.stride_h) * a.width;
  const int64_t output = (image * a.out_height + begin) * a.out_width * a.out_channels;
  a.x += pixel * a.channels;
  a.batch = 1;
  a.height = (end - begin - 1) * a.stride_h + 1;
  a.out_height = end - begin;
  Epilogue& e = a.epilogue;
  if (e.residual_u8) e.residual_u8 += output;
  if (e.residual_f32) e.residual_f32 += output;
  if (e.out_u8) e.out_u8 += output;
  if (e.out_f32) e.out_f32 += output;
  return a;
}

// body(part of a, the same part of b) for parts whose float outputs stay in cache: all of them are
// in the same place, the first one's.
template <class Body>
void for_each_block(const PackedConv& a, const PackedConv& b, Body body) {
  const int64_t line_bytes = a.out_width * a.out_channels * 4;
  const int64_t lines = std::max<int64_t>(1, num_threads() * kBlockBytes / line_bytes);
  for (int64_t image = 0; image < a.batch; ++image) {
    for (int64_t line = 0; line < a.out_height; line += lines) {
      const int64_t end = std::min(line + lines, a.out_height);
      PackedConv first = lines_of(a, image, line, end), second = lines_of(b, image, line, end);
      first.epilogue.out_f32 = a.epilogue.out_f32;
      second.epilogue.residual_f32 = a.epilogue.out_f32;
      body(first, second);
    }
  }
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
      case kCopy: steps_.push_back(decode_copy(r)); break;
      case kPair: pairs_.insert(steps_.size()); break;
      case kEachImage:
        images_ = r.next();
        image_steps_ = static_cast<size_t>(r.next());
        break;
      default: throw std::invalid_argument("program: unknown instruction");
    }
  }
  for (size_t first : pairs_) {
    for (size_t i : {first, first + 1}) {
      if (i >= steps_.size() || !std::holds_alternative<PackedConv>(steps_[i])) {
        throw std::invalid_argument("program: a pair is two convolutions");
      }
    }
  }
  if (image_steps_ > 0 &&
      (image_steps_ > steps_.size() || !std::holds_alternative<Quantize>(steps_[0]) ||
       !std::holds_alternative<PackedConv>(steps_[image_steps_ - 1]))) {
    throw std::invalid_argument("program: an image goes from a quantisation to a convolution");
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
  auto resolved = [&](size_t i, int64_t image) {
    Step step = steps_[i];
    std::visit(
        [&](auto& a) {
          visit_sources(a, [&](auto& source) {
            const intptr_t at = reinterpret_cast<intptr_t>(source);
            if (at < 0) source = static_cast<std::decay_t<decltype(source)>>(inputs[-1 - at]);
          });
        },
        step);
    if (i == 0 && image > 0) {
      Quantize& first = std::get<Quantize>(step);
      first.x += image * first.stride_n;
    }
    if (i + 1 == image_steps_ && image > 0) {
      PackedConv& last = std::get<PackedConv>(step);
      last.epilogue.out_u8 += image * last.out_height * last.out_width * last.out_channels;
    }
    return step;
  };
  auto timed = [&](size_t i, auto body) {
    const double start = seconds ? now() : 0.0;
    const char* kernel = body();
    if (seconds) seconds[i] += now() - start;
    return kernel;
  };
  if (seconds) std::fill_n(seconds, steps_.size(), 0.0);
  auto run_steps = [&](size_t begin, size_t end, int64_t image) {
    for (size_t i = begin; i < end; ++i) {
      const Step step = resolved(i, image);
      const char *kernel = nullptr, *second = nullptr;
      const bool pair = pairs_.count(i) > 0;
      if (pair) {
        for_each_block(std::get<PackedConv>(step), std::get<PackedConv>(resolved(i + 1, image)),
                       [&](const PackedConv& a, const PackedConv& b) {
                         kernel = timed(i, [&] { return run_step(a); });
                         second = timed(i + 1, [&] { return run_step(b); });
                       });
        ++i;
      } else {
        kernel =
            timed(i, [&] { return std::visit([](const auto& a) { return run_step(a); }, step); });
      }
      if (!kernels || image > 0) continue;
      kernels->push_back(kernel);
      if (pair) kernels->push_back(second);
    }
  };
  for (int64_t image = 0; image < images_; ++image) run_steps(0, image_steps_, image);
  run_steps(image_steps_, steps_.size(), 0);
}

}  // namespace fdda
