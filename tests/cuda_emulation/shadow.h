// What the emulator knows of every byte of the kernels' memory.
#pragma once

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <vector>

namespace emulation {

// When an access happens: __syncthreads ends a phase of the block, __syncwarp one of the warp.
struct Order {
  int thread;
  uint32_t block_phase, warp_phase;
  uint32_t warp_phases[32];

  void reset() {
    memset(this, 0, sizeof *this);
    block_phase = 1;
  }
};

enum class Who : uint8_t { kThread, kWarp, kBlock };

// The last accesses of one kind to a byte; phase 0: none.
struct Access {
  uint32_t block_phase, warp_phase;
  int16_t thread;
  Who who;  // thread, others of its warp, too, or others of its block

  bool before(const Order& now) const {
    if (block_phase < now.block_phase) return true;
    if (who == Who::kBlock || thread / 32 != now.thread / 32) return false;
    return warp_phase < now.warp_phase || (who == Who::kThread && thread == now.thread);
  }

  void add(const Order& now) {
    if (before(now)) {
      who = Who::kThread;
    } else if (thread / 32 != now.thread / 32) {
      who = Who::kBlock;
    } else if (who == Who::kThread) {
      who = Who::kWarp;
    }
    block_phase = now.block_phase;
    warp_phase = now.warp_phase;
    thread = static_cast<int16_t>(now.thread);
  }
};

class SharedMemory {
 public:
  SharedMemory(uint8_t* begin, size_t bytes) : begin_(begin), shadow_(bytes) {}

  uint8_t* begin() const { return begin_; }
  size_t capacity() const { return shadow_.size(); }

  void reset(size_t bytes, uint8_t poison) {
    size_ = bytes;
    if (capacity()) memset(begin_, poison, capacity());
    shadow_.assign(capacity(), Byte{});
  }

  bool contains(const void* address) const {
    return static_cast<size_t>(static_cast<const uint8_t*>(address) - begin_) < capacity();
  }

  // What is wrong with the access, or null.
  const char* access(const void* address, size_t bytes, bool write, const Order& now) {
    const size_t first = static_cast<const uint8_t*>(address) - begin_;
    if (first + bytes > size_) return "out of bounds";
    for (size_t i = first; i < first + bytes; ++i) {
      Byte& byte = shadow_[i];
      if (byte.in_flight) return "in flight";
      if (!byte.write.before(now) || (write && !byte.read.before(now))) return "race";
      if (!write && !byte.write.block_phase) return "uninitialised";
      (write ? byte.write : byte.read).add(now);
    }
    return nullptr;
  }

  void start(const void* address, size_t bytes) { set_in_flight(address, bytes, true); }
  void finish(const void* address, size_t bytes) { set_in_flight(address, bytes, false); }

 private:
  struct Byte {
    Access write, read;
    bool in_flight;
  };

  void set_in_flight(const void* address, size_t bytes, bool value) {
    const size_t first = static_cast<const uint8_t*>(address) - begin_;
    for (size_t i = first; i < first + bytes; ++i) shadow_[i].in_flight = value;
  }

  uint8_t* begin_;
  size_t size_ = 0;
  std::vector<Byte> shadow_;
};

// Buffers lie apart in one range of addresses, so that an access between them is seen.
class GlobalMemory {
 public:
  GlobalMemory() : begin_(map()), shadow_(map()) {}

  bool contains(const void* address) const {
    return static_cast<size_t>(static_cast<const uint8_t*>(address) - begin_) < kBytes;
  }

  // Null when the range is full.
  void* allocate(size_t bytes) {
    const size_t first = used_ + kGap;
    if (bytes > kBytes - 2 * kGap || first > kBytes - 2 * kGap - bytes) return nullptr;
    memset(shadow_ + first, kAllocated, bytes);
    used_ = (first + bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin_ + first;
  }

  void initialise(const void* buffer, size_t bytes) {
    memset(state(buffer), kAllocated | kInitialised, bytes);
  }

  size_t initialised(const void* buffer, size_t bytes) const {
    size_t i = 0;
    while (i < bytes && state(buffer)[i] & kInitialised) ++i;
    return i;
  }

  void clear() {
    memset(shadow_, 0, used_);
    used_ = 0;
  }

  void start_launch() {
    for (size_t i = 0; i < used_; ++i) shadow_[i] &= ~(kRead | kWritten);
  }

  const char* access(const void* address, size_t bytes, bool write) {
    uint8_t* states = state(address);
    for (size_t i = 0; i < bytes; ++i) {
      if (!(states[i] & kAllocated)) return "out of bounds";
      if (states[i] & kWritten || (write && states[i] & kRead)) return "race";
      if (!write && !(states[i] & kInitialised)) return "uninitialised";
      states[i] |= write ? kWritten | kInitialised : kRead;
    }
    return nullptr;
  }

 private:
  // kRead and kWritten: in this launch.
  enum : uint8_t { kAllocated = 1, kInitialised = 2, kRead = 4, kWritten = 8 };
  static constexpr size_t kBytes = size_t{1} << 28;
  static constexpr size_t kGap = 4096;
  static constexpr size_t kAlignment = 512;

  static uint8_t* map() {
    return static_cast<uint8_t*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }

  uint8_t* state(const void* address) const {
    return shadow_ + (static_cast<const uint8_t*>(address) - begin_);
  }

  uint8_t* begin_;
  uint8_t* shadow_;
  size_t used_ = 0;
};

}  // namespace emulation
