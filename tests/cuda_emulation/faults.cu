// Kernels with one fault each, see test_faults.py; 64 threads, 1024 bytes of shared memory.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/ptx.h"

using namespace fdda::cuda;

namespace {

struct Buffers {
  const uint8_t* in;  // 1024 bytes
  uint8_t* out;       // 1024 bytes, uninitialised
};

using Body = void (*)(Buffers, uint8_t*, int);

template <Body body>
__global__ void kernel(Buffers b) {
  body(b, ptx::dynamic_shared(), threadIdx.x);
}

void none(Buffers b, uint8_t* shared, int i) {
  shared[i] = b.in[i];
  __syncthreads();
  const uint8_t value = shared[63 - i];
  shared[64 + i] = value;
  __syncwarp();
  b.out[i] = shared[64 + (i ^ 1)];
}

void missing_barrier(Buffers b, uint8_t* shared, int i) {
  shared[i] = b.in[i];
  b.out[i] = shared[63 - i];
}

void barrier_of_the_warp_only(Buffers b, uint8_t* shared, int i) {
  shared[i] = b.in[i];
  __syncwarp();
  b.out[i] = shared[63 - i];
}

void shuffle_for_a_barrier(Buffers b, uint8_t* shared, int i) {
  shared[i] = b.in[i];
  __shfl_xor_sync(0xffffffff, i, 1);
  b.out[i] = shared[i ^ 1];
}

void missing_barrier_before_the_next_write(Buffers b, uint8_t* shared, int i) {
  shared[i] = b.in[i];
  __syncthreads();
  b.out[i] = shared[63 - i];
  shared[i] = 0;
}

void two_writers(Buffers, uint8_t* shared, int i) { shared[i / 2] = static_cast<uint8_t>(i); }

void copy(Buffers b, uint8_t* shared, int i) {
  ptx::copy_async<16>(shared + i * 16, b.in + i * 16, 16);
  ptx::commit_copies();
}

void missing_wait(Buffers b, uint8_t* shared, int i) {
  copy(b, shared, i);
  __syncthreads();
  b.out[i] = shared[i * 16];
}

void wait_for_the_group_before(Buffers b, uint8_t* shared, int i) {
  copy(b, shared, i);
  ptx::wait_copies<1>();
  __syncthreads();
  b.out[i] = shared[i * 16];
}

void wait_without_commit(Buffers b, uint8_t* shared, int i) {
  ptx::copy_async<16>(shared + i * 16, b.in + i * 16, 16);
  ptx::wait_copies<0>();
  b.out[i] = shared[i * 16];
}

void wait_without_barrier(Buffers b, uint8_t* shared, int i) {
  copy(b, shared, i);
  ptx::wait_copies<0>();
  b.out[i] = shared[(63 - i) * 16];
}

void copy_over_what_is_read(Buffers b, uint8_t* shared, int i) {
  shared[i] = b.in[i];
  __syncthreads();
  b.out[i] = shared[63 - i];
  copy(b, shared, i);
  ptx::wait_copies<0>();
}

void end_in_flight(Buffers b, uint8_t* shared, int i) { copy(b, shared, i); }

void uninitialised_shared(Buffers b, uint8_t* shared, int i) { b.out[i] = shared[i]; }

void uninitialised_static(Buffers b, uint8_t*, int i) {
  __shared__ int values[64];
  if (i < 63) values[i] = i;
  __syncthreads();
  b.out[i] = static_cast<uint8_t>(values[63 - i]);
}

void uninitialised_global(Buffers b, uint8_t*, int i) { b.out[i] = b.out[i + 64]; }

void uninitialised_matrix(Buffers, uint8_t* shared, int i) {
  shared[i * 16 + 1] = 0;
  __syncthreads();
  uint32_t registers[4];
  ptx::load_matrices(registers, shared + i % 32 * 16);
}

void tail_of_a_read(Buffers b, uint8_t*, int i) { b.out[i] = b.in[1024 - 63 + i]; }
void tail_of_a_write(Buffers b, uint8_t*, int i) { b.out[1024 - 63 + i] = 0; }
void before_a_buffer(Buffers b, uint8_t*, int i) { b.out[i] = b.in[i - 1]; }
void tail_of_shared(Buffers, uint8_t* shared, int i) { shared[1024 - 63 + i] = 0; }

void tail_of_a_copy(Buffers b, uint8_t* shared, int i) {
  ptx::copy_async<16>(shared + i * 16, b.in + (i + 1) * 16, 16);
  ptx::commit_copies();
  ptx::wait_copies<0>();
}

void null_pointer(Buffers, uint8_t*, int i) { static_cast<volatile uint8_t*>(nullptr)[i] = 0; }

void misaligned_vector(Buffers b, uint8_t*, int) { ptx::load_16(b.in + 8); }
void misaligned_word(Buffers b, uint8_t*, int i) { reinterpret_cast<int*>(b.out + 2)[i] = i; }
void misaligned_copy(Buffers b, uint8_t* shared, int) { ptx::copy_async<16>(shared + 4, b.in, 16); }
void misaligned_source(Buffers b, uint8_t* shared, int) { ptx::copy_async<8>(shared, b.in + 4, 8); }
void misaligned_matrix(Buffers, uint8_t* shared, int i) {
  uint32_t registers[1];
  ptx::load_matrices(registers, shared + i * 8);
}

void divergent_barrier(Buffers, uint8_t*, int i) {
  if (i < 40) __syncthreads();
}

void divergent_return(Buffers, uint8_t*, int i) {
  if (i == 5) return;
  __syncthreads();
}

void divergent_shuffle(Buffers, uint8_t*, int i) {
  if (i % 2) __shfl_xor_sync(0xffffffff, i, 2);
}

void different_functions(Buffers, uint8_t*, int i) {
  if (i % 2) {
    __shfl_xor_sync(0xffffffff, i, 2);
  } else {
    __syncwarp();
  }
}

void global_race(Buffers b, uint8_t*, int i) { b.out[i / 2] = static_cast<uint8_t>(i); }

}  // namespace

#define FDDA_FAULT(name)                                          \
  extern "C" void fault_##name(const uint8_t* in, uint8_t* out) { \
    launch(kernel<name>, 1, 64, 1024, nullptr, Buffers{in, out}); \
  }
FDDA_FAULT(none)
FDDA_FAULT(missing_barrier)
FDDA_FAULT(barrier_of_the_warp_only)
FDDA_FAULT(shuffle_for_a_barrier)
FDDA_FAULT(missing_barrier_before_the_next_write)
FDDA_FAULT(two_writers)
FDDA_FAULT(missing_wait)
FDDA_FAULT(wait_for_the_group_before)
FDDA_FAULT(wait_without_commit)
FDDA_FAULT(wait_without_barrier)
FDDA_FAULT(copy_over_what_is_read)
FDDA_FAULT(end_in_flight)
FDDA_FAULT(uninitialised_shared)
FDDA_FAULT(uninitialised_static)
FDDA_FAULT(uninitialised_global)
FDDA_FAULT(uninitialised_matrix)
FDDA_FAULT(tail_of_a_read)
FDDA_FAULT(tail_of_a_write)
FDDA_FAULT(before_a_buffer)
FDDA_FAULT(tail_of_shared)
FDDA_FAULT(tail_of_a_copy)
FDDA_FAULT(null_pointer)
FDDA_FAULT(misaligned_vector)
FDDA_FAULT(misaligned_word)
FDDA_FAULT(misaligned_copy)
FDDA_FAULT(misaligned_source)
FDDA_FAULT(misaligned_matrix)
FDDA_FAULT(divergent_barrier)
FDDA_FAULT(divergent_return)
FDDA_FAULT(divergent_shuffle)
FDDA_FAULT(different_functions)
FDDA_FAULT(global_race)

extern "C" void fault_too_much_shared(const uint8_t* in, uint8_t* out) {
  launch(kernel<none>, 1, 64, 48 * 1024 + 1, nullptr, Buffers{in, out});
}
