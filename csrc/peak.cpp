// The processor's rate of 8-bit multiply-accumulates on registers, with the active instruction
// set's instruction for them: what kernels are compared with.
#include <chrono>
#include <cstring>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fdda {
namespace {

#if defined(__x86_64__)
constexpr int kChains = 12;  // independent sums: more than the instructions' latency needs
constexpr int64_t kLoops = 100000;

// All of `loops` times kChains steps; the compiler must neither drop, hoist nor reorder them, nor
// keep sums in memory.
#define FDDA_CHAINS(name, isa, Register, zero, step)                \
  __attribute__((target(isa), noinline)) void name(int64_t loops) { \
    Register x = zero;                                              \
    Register sums[kChains];                                         \
    _Pragma("GCC unroll 12") for (Register& sum : sums) sum = x;    \
    for (int64_t i = 0; i < loops; ++i) {                           \
      _Pragma("GCC unroll 12") for (int k = 0; k < kChains; ++k) {  \
        sums[k] = step(sums[k], x);                                 \
        asm volatile("" : "+v"(sums[k]), "+v"(x));                  \
      }                                                             \
    }                                                               \
  }

#define FDDA_MADDUBS(sum, x) _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, x))
#define FDDA_MADDUBS_512(sum, x) _mm512_add_epi16(sum, _mm512_maddubs_epi16(x, x))
#define FDDA_DPBUSD(sum, x) _mm256_dpbusd_avx_epi32(sum, x, x)
#define FDDA_DPBUSD_VL(sum, x) _mm256_dpbusd_epi32(sum, x, x)
#define FDDA_DPBUSD_512(sum, x) _mm512_dpbusd_epi32(sum, x, x)

FDDA_CHAINS(avx2_chains, "avx2", __m256i, _mm256_setzero_si256(), FDDA_MADDUBS)
FDDA_CHAINS(avxvnni_chains, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), FDDA_DPBUSD)
FDDA_CHAINS(avxvnni_evex_chains, "avx512vl,avx512vnni", __m256i, _mm256_setzero_si256(),
            FDDA_DPBUSD_VL)
FDDA_CHAINS(avx512_chains, "avx512f,avx512bw", __m512i, _mm512_setzero_si512(), FDDA_MADDUBS_512)
FDDA_CHAINS(avx512vnni_chains, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(),
            FDDA_DPBUSD_512)

double rate(void (*chains)(int64_t), int macs) {
  using Clock = std::chrono::steady_clock;
  double best = 0.0;
  for (int i = 0; i < 20; ++i) {
    const Clock::time_point start = Clock::now();
    chains(kLoops);
    const std::chrono::duration<double> seconds = Clock::now() - start;
    const double found = static_cast<double>(kLoops * kChains * macs) / seconds.count();
    best = found > best ? found : best;
  }
  return best;
}
#endif

}  // namespace

double peak_macs_per_second() {
#if defined(__x86_64__)
  const char* isa = active_isa();
  if (std::strcmp(isa, "avx2") == 0) return rate(avx2_chains, 32);
  if (std::strcmp(isa, "avxvnni") == 0) {
    return rate(__builtin_cpu_supports("avxvnni") ? avxvnni_chains : avxvnni_evex_chains, 32);
  }
  if (std::strcmp(isa, "avx512") == 0) return rate(avx512_chains, 64);
  if (std::strcmp(isa, "avx512vnni") == 0) return rate(avx512vnni_chains, 64);
  if (std::strcmp(isa, "amx") == 0) {
    // A product of tiles takes as long as 16 steps: as many of each as elsewhere.
    return rate([](int64_t loops) { amx::multiply_tiles(loops * kChains / 16); }, 16 * 64);
  }
#endif
  return 0.0;
}

}  // namespace fdda
