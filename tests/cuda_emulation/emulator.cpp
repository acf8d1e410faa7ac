#include "emulator.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"
#include "shadow.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

// From the linker: the section of the variables in static shared memory, null without any.
extern "C" __attribute__((weak)) uint8_t __start_emulated_shared[];
extern "C" __attribute__((weak)) uint8_t __stop_emulated_shared[];

namespace emulation {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;
constexpr uint8_t kPoison = 0xa5;

struct Copy {
  uint8_t* shared;
  const uint8_t* global;
  int size, bytes;
};

struct Thread {
  ucontext_t entry;
  jmp_buf at;
  std::unique_ptr<uint8_t[]> stack;
  bool started = false, running = false;
  const char* waits_at;  // what the thread is suspended in
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// What the lanes of a warp bring to a function of the whole warp, and what they take from it.
struct Lane {
  const void* address;
  uint32_t in[10];
  uint32_t out[4];
  Format formats[2];
};

struct Warp {
  const char* function;
  int arrived;
  Lane lanes[kLanes];
};

std::vector<Thread> threads(kMaxThreads);
Warp warps[kMaxThreads / kLanes];
std::vector<int> runnable;
int num_threads, current, at_barrier;
Order order;  // of accesses, see shadow.h
jmp_buf scheduler, launched;
const std::function<void()>* kernel;
std::minstd_rand random_numbers;
char message[512];

// The room behind what a launch asks for is out of bounds.
alignas(128) uint8_t dynamic_bytes[kSharedBytes + 4096];
SharedMemory dynamic_memory(dynamic_bytes, sizeof dynamic_bytes);
SharedMemory static_memory(__start_emulated_shared,
                           __stop_emulated_shared - __start_emulated_shared);
GlobalMemory global_memory;
int64_t bank_conflicts;

void suspend(const char* where) {
  threads[current].waits_at = where;
  if (!_setjmp(threads[current].at)) _longjmp(scheduler, 1);
}

void thread_main() {
  for (;;) {
    (*kernel)();
    const Thread& thread = threads[current];
    bool copies = !thread.open.empty();
    for (const auto& group : thread.groups) copies |= !group.empty();
    if (copies) fail("thread ends with cp.async in flight");
    threads[current].running = false;
    suspend("the end");
  }
}

void resume(int thread) {
  current = thread;
  order.thread = thread;
  order.warp_phase = order.warp_phases[thread / kLanes];
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y,
                   thread / (blockDim.x * blockDim.y));
  Thread& t = threads[thread];
  if (_setjmp(scheduler)) return;
  if (t.started) _longjmp(t.at, 1);
  t.started = true;
  setcontext(&t.entry);
}

// After a fault the fibres are left wherever they were.
void make_fibre(Thread& t) {
  if (t.started && !t.running) return;
  if (!t.stack) t.stack.reset(new uint8_t[kStackBytes]);
  getcontext(&t.entry);
  t.entry.uc_stack.ss_sp = t.stack.get();
  t.entry.uc_stack.ss_size = kStackBytes;
  t.entry.uc_link = nullptr;
  makecontext(&t.entry, thread_main, 0);
  t.started = false;
}

void run_block(size_t shared_bytes) {
  num_threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  dynamic_memory.reset(shared_bytes, kPoison);
  static_memory.reset(static_memory.capacity(), kPoison);
  order.reset();
  at_barrier = 0;
  for (Warp& warp : warps) warp.arrived = 0;
  runnable.clear();
  for (int i = 0; i < num_threads; ++i) {
    Thread& t = threads[i];
    make_fibre(t);
    t.running = true;
    t.open.clear();
    t.groups.clear();
    runnable.push_back(i);
  }
  while (!runnable.empty()) {
    std::swap(runnable[random_numbers() % runnable.size()], runnable.back());
    const int next = runnable.back();
    runnable.pop_back();
    resume(next);
  }
  for (current = 0; current < num_threads; ++current) {
    if (threads[current].running) fail("divergent %s", threads[current].waits_at);
  }
}

// The last lane to arrive runs the function for all.
Lane& collective(const char* function, const Lane& mine, void (*apply)(Lane*)) {
  Warp& warp = warps[current / kLanes];
  if (warp.arrived && warp.function != function) {
    fail("divergent: %s where other lanes are in %s", function, warp.function);
  }
  warp.function = function;
  Lane& lane = warp.lanes[current % kLanes];
  lane = mine;
  if (++warp.arrived < kLanes) {
    suspend(function);
    return lane;
  }
  const int caller = current, first = current / kLanes * kLanes;
  apply(warp.lanes);
  order.thread = caller;
  warp.arrived = 0;
  for (int i = first; i < first + kLanes; ++i) {
    if (i != caller) runnable.push_back(i);
  }
  return lane;
}

void check(const void* address, size_t bytes, bool write, size_t alignment = 1) {
  const char* fault = nullptr;
  if (dynamic_memory.contains(address)) {
    fault = dynamic_memory.access(address, bytes, write, order);
  } else if (global_memory.contains(address)) {
    fault = global_memory.access(address, bytes, write);
  } else if (static_memory.contains(address)) {
    fault = static_memory.access(address, bytes, write, order);
  } else {
    if (reinterpret_cast<uintptr_t>(address) < 4096) fail("out of bounds: null pointer");
    return;  // the threads' stacks, arguments, constants
  }
  if (!fault && reinterpret_cast<uintptr_t>(address) % alignment) fault = "misaligned";
  if (fault) fail("%s: %s of %zu bytes", fault, write ? "write" : "read", bytes);
}

void complete(const std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    dynamic_memory.finish(copy.shared, copy.size);
    check(copy.shared, copy.size, true);
    memcpy(copy.shared, copy.global, copy.bytes);
    memset(copy.shared + copy.bytes, 0, copy.size - copy.bytes);
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const int length = vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  snprintf(message + length, sizeof message - length, "; block (%u, %u, %u), thread %d", blockIdx.x,
           blockIdx.y, blockIdx.z, current);
  _longjmp(launched, 1);
}

int launch(const cudaLaunchConfig_t& config, const std::function<void()>& function) {
  if (message[0]) return 1;  // sticky, as in CUDA
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  blockIdx = dim3(0, 0, 0);
  current = 0;
  kernel = &function;
  global_memory.start_launch();
  if (_setjmp(launched)) return 1;
  if (config.dynamicSmemBytes > kSharedBytes) {
    fail("launch: %zu bytes of shared memory", config.dynamicSmemBytes);
  }
  if (blockDim.x * blockDim.y * blockDim.z > kMaxThreads) fail("launch: too many threads");
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(config.dynamicSmemBytes);
    }
  }
  return 0;
}

int current_thread() { return current; }
uint8_t* dynamic_shared() { return dynamic_memory.begin(); }

void block_barrier() {
  if (++at_barrier < num_threads) {
    suspend("__syncthreads");
    return;
  }
  at_barrier = 0;
  ++order.block_phase;
  for (int i = 0; i < num_threads; ++i) {
    if (i != current) runnable.push_back(i);
  }
}

void warp_barrier() {
  collective("__syncwarp", {}, [](Lane*) { ++order.warp_phases[current / kLanes]; });
  order.warp_phase = order.warp_phases[current / kLanes];
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned: access of %zu bytes", bytes);
}

uint32_t shuffle(uint32_t value, int source) {
  return collective("shfl", {nullptr, {value, static_cast<uint32_t>(source)}, {}, {}},
                    [](Lane* lanes) {
                      for (int i = 0; i < kLanes; ++i)
                        lanes[i].out[0] = lanes[lanes[i].in[1]].in[0];
                    })
      .out[0];
}

namespace {

// Rows of a matrix are read at once when their 16 bytes lie in different banks.
void check_rows(const Lane* rows) {
  int rows_of_banks[8] = {};
  for (int r = 0; r < 8; ++r) {
    check_aligned(rows[r].address, 16);
    if (!dynamic_memory.contains(rows[r].address)) fail("out of bounds: ldmatrix");
    ++rows_of_banks[reinterpret_cast<uintptr_t>(rows[r].address) / 16 % 8];
  }
  bank_conflicts += *std::max_element(rows_of_banks, rows_of_banks + 8) - 1;
}

// Each lane reads what it gets, whoever brought the address.
template <bool kTransposed>
void load_matrices(Lane* lanes) {
  const int first = current / kLanes * kLanes, count = static_cast<int>(lanes[0].in[0]);
  for (int m = 0; m < count; ++m) {
    const Lane* rows = lanes + m * 8;
    check_rows(rows);
    for (int i = 0; i < kLanes; ++i) {
      order.thread = first + i;
      uint16_t halves[2];
      for (int h = 0; h < 2; ++h) {
        const int along = i % 4 * 2 + h, across = i / 4;
        const void* row = rows[kTransposed ? along : across].address;
        const uint8_t* half = static_cast<const uint8_t*>(row) + (kTransposed ? across : along) * 2;
        check(half, 2, false);
        memcpy(&halves[h], half, 2);
      }
      lanes[i].out[m] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
    }
  }
}

int element(const uint32_t* registers, int index, Format format) {
  const int width = 32 / format.bits;  // elements to a register
  const uint32_t code =
      registers[index / width] >> index % width * format.bits & ((1u << format.bits) - 1);
  const int sign = format.is_signed ? 1 << (format.bits - 1) : 0;
  return static_cast<int>(code ^ sign) - sign;
}

void multiply(Lane* lanes) {
  const Format* formats = lanes[0].formats;
  const int width = 32 / formats[0].bits, depth = 8 * width;
  int a[16][64], b[8][64];
  for (int i = 0; i < kLanes; ++i) {
    const int group = i / 4, t = i % 4;
    for (int e = 0; e < 4 * width; ++e) {
      const int part = e / width;
      a[group + part % 2 * 8][(part / 2 * 4 + t) * width + e % width] =
          element(lanes[i].in + 4, e, formats[0]);
    }
    for (int e = 0; e < 2 * width; ++e) {
      b[group][(e / width * 4 + t) * width + e % width] = element(lanes[i].in + 8, e, formats[1]);
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    for (int e = 0; e < 4; ++e) {
      const int* row = a[i / 4 + e / 2 * 8];
      const int* column = b[i % 4 * 2 + e % 2];
      uint32_t sum = lanes[i].in[e];
      for (int k = 0; k < depth; ++k) sum += row[k] * column[k];
      lanes[i].out[e] = sum;
    }
  }
}

}  // namespace

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row) {
  const Lane& lane = collective(transposed ? "ldmatrix.trans" : "ldmatrix",
                                {row, {static_cast<uint32_t>(count)}, {}, {}},
                                transposed ? load_matrices<true> : load_matrices<false>);
  memcpy(registers, lane.out, count * sizeof *registers);
}

void multiply(int32_t* c, const uint32_t* a, Format a_format, const uint32_t* b, Format b_format) {
  Lane mine{nullptr, {}, {}, {a_format, b_format}};
  memcpy(mine.in, c, 16);
  memcpy(mine.in + 4, a, 16);
  memcpy(mine.in + 8, b, 8);
  memcpy(c, collective("mma", mine, multiply).out, 16);
}

void copy_async(void* shared, const void* global, int size, int bytes) {
  if (bytes < 0 || bytes > size) fail("cp.async: %d of %d bytes", bytes, size);
  check_aligned(shared, size);
  check_aligned(global, size);
  if (!dynamic_memory.contains(shared)) fail("out of bounds: cp.async");
  if (bytes && !global_memory.contains(global)) fail("out of bounds: cp.async");
  if (bytes) check(global, bytes, false);
  check(shared, size, true);
  dynamic_memory.start(shared, size);
  memset(shared, kPoison, size);
  threads[current].open.push_back(
      {static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global), size, bytes});
}

void commit_copies() {
  Thread& t = threads[current];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void wait_copies(int groups_left) {
  auto& groups = threads[current].groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    complete(groups.front());
    groups.pop_front();
  }
}

}  // namespace emulation

// For Python.
extern "C" {

void* emulation_allocate(size_t bytes) { return emulation::global_memory.allocate(bytes); }

// Buffers of an input: the kernels may read them.
void emulation_initialise(void* buffer, size_t bytes) {
  emulation::global_memory.initialise(buffer, bytes);
}

// The first byte that no kernel has written, or `bytes`.
size_t emulation_written(const void* buffer, size_t bytes) {
  return emulation::global_memory.initialised(buffer, bytes);
}

// Forgets all buffers and the error, and draws another order of the threads.
void emulation_reset(unsigned seed) {
  emulation::global_memory.clear();
  emulation::message[0] = 0;
  emulation::bank_conflicts = 0;
  emulation::random_numbers.seed(seed + 1);
}

// Of ldmatrix.
int64_t emulation_bank_conflicts() { return emulation::bank_conflicts; }

const char* emulation_error() { return emulation::message; }

// What -fsanitize=thread calls.
#define FDDA_TSAN(bytes)                                                                   \
  void __tsan_read##bytes(void* p) { emulation::check(p, bytes, false, bytes); }           \
  void __tsan_write##bytes(void* p) { emulation::check(p, bytes, true, bytes); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulation::check(p, bytes, false, bytes); } \
  void __tsan_unaligned_write##bytes(void* p) { emulation::check(p, bytes, true, bytes); }
FDDA_TSAN(1)
FDDA_TSAN(2)
FDDA_TSAN(4)
FDDA_TSAN(8)
FDDA_TSAN(16)
void __tsan_read_range(void* p, size_t bytes) { emulation::check(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulation::check(p, bytes, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
