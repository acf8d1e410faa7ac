// Threads come from torch, so that torch.set_num_threads holds for these kernels too.
#include "cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <new>

namespace fdda {
namespace {

constexpr size_t kAlignment = 64;

struct Buffer {
  void* memory = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(memory); }
};

thread_local Buffer buffers[kNumScratchSlots];

}  // namespace

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel_for_impl(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                       void* context) {
  if (count <= grain) {
    body(0, count, context);
    return;
  }
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

void* scratch(ScratchSlot slot, size_t bytes) {
  Buffer& b = buffers[slot];
  if (b.size < bytes) {
    std::free(b.memory);
    b.size = (bytes + bytes / 4 + kAlignment) / kAlignment * kAlignment;
    b.memory = std::aligned_alloc(kAlignment, b.size);
    if (!b.memory) {
      b.size = 0;
      throw std::bad_alloc();
    }
  }
  return b.memory;
}

}  // namespace fdda
