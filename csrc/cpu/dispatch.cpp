#include <atomic>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fdda {
namespace {

#if defined(__x86_64__)
Kernels with_packed_conv2d(Kernels kernels, const char* (*packed_conv2d)(const PackedConv&)) {
  kernels.packed_conv2d = packed_conv2d;
  return kernels;
}

const Kernels avxvnni_kernels = with_packed_conv2d(
    avx2::kernels,
    __builtin_cpu_supports("avxvnni") ? avxvnni::packed_conv2d : avxvnni_evex::packed_conv2d);

bool supports_avx512bf16() { return __builtin_cpu_supports("avx512bf16"); }

Kernels with_bfloat16(Kernels kernels) {
  if (supports_avx512bf16()) avx512bf16::take_bfloat16(kernels);
  return kernels;
}

const Kernels avx512vnni_kernels = with_bfloat16(avx512vnni::kernels);
const Kernels amx_kernels = with_packed_conv2d(avx512vnni_kernels, amx::packed_conv2d);

bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool supports_avx512vnni() { return supports_avx512() && __builtin_cpu_supports("avx512vnni"); }

// Linux enlarges a process's saved state by the tiles on request only.
bool supports_amx() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return supports_avx512vnni() && __builtin_cpu_supports("gfni") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// __builtin_cpu_supports also asks the operating system for the wide registers' state.
const Isa kIsas[kNumIsas] = {
    {"generic", &generic::kernels, true},
    {"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")},
    {"avxvnni", &avxvnni_kernels,
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
         (__builtin_cpu_supports("avxvnni") ||
          (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")))},
    {"avx512", &avx512::kernels, supports_avx512()},
    {"avx512vnni", &avx512vnni_kernels, supports_avx512vnni()},
    {"amx", &amx_kernels, supports_amx()},
};
#else
const Isa kIsas[kNumIsas] = {
    {"generic", &generic::kernels, true}, {"avx2", nullptr, false},
    {"avxvnni", nullptr, false},          {"avx512", nullptr, false},
    {"avx512vnni", nullptr, false},       {"amx", nullptr, false},
};
#endif

constexpr int kAvx512 = 3, kAvx512Vnni = 4;  // of kIsas

std::atomic<const Isa*> active{nullptr};

const Isa* current() {
  if (!active.load()) select_isa(nullptr);
  return active.load();
}

}  // namespace

const Isa* isas() { return kIsas; }

const Kernels& active_kernels() { return *current()->kernels; }

const char* active_isa() { return current()->name; }

bool prefers_own_products() {
#if defined(__x86_64__)
  // MKL, the framework's library, uses AVX-512 on Intel's processors only.
  return current() >= &kIsas[kAvx512] && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool prefers_own_bfloat16_products() {
#if defined(__x86_64__)
  // oneDNN, the framework's library, multiplies by AMX's tiles where there are any: faster by far.
  return current() >= &kIsas[kAvx512Vnni] && supports_avx512bf16() &&
         !__builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

const char* select_isa(const char* name) {
  for (int i = kNumIsas - 1; i >= 0; --i) {
    if (name ? std::strcmp(name, kIsas[i].name) != 0 : !kIsas[i].supported) continue;
    if (!kIsas[i].supported) return "is not supported by this processor";
    active = &kIsas[i];
    return nullptr;
  }
  return "is not a known instruction set";
}

}  // namespace fdda
