// Threads and scratch memory without the framework's headers; parallel.cpp implements them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace fdda {

int64_t num_threads();

void parallel_for_impl(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*),
                       void* context);

// body(begin, end) over [0, count) in pieces of at least `grain`. Results must not depend on the
// split.
template <class Body>
static inline void parallel_for(int64_t count, int64_t grain, Body body) {
  if (count <= 0) return;
  parallel_for_impl(
      count, grain,
      [](int64_t begin, int64_t end, void* b) { (*static_cast<Body*>(b))(begin, end); }, &body);
}

// 64-byte aligned memory owned by the calling thread, kept between calls (fresh pages cost more
// than the kernels that use them). A later call with the same slot invalidates it.
enum ScratchSlot {
  kSharedWeights,
  kSharedRows,
  kLocalWeights,
  kLocalRows,
  kPlanes,
  kSums,
  kOffsets,
  kTiles,
  kStrip,
  kNumScratchSlots
};
void* scratch(ScratchSlot slot, size_t bytes);

}  // namespace fdda
