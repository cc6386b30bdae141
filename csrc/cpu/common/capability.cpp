// Which instruction set the CPU kernels use on this machine: `svitt_ops::cpu_capability`.

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>

#include "../../library.h"
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace svitt {
namespace {

// AMX needs the processor's word and the kernel's leave to use the tile registers.
bool amx_usable() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0)
    return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  Isa best = Isa::generic;
#define SVITT_DETECT(name, word, present) \
  if (!(present)) return best; \
  best = Isa::name;
  SVITT_SETS(SVITT_DETECT)
#undef SVITT_DETECT
  return best;
}

#define SVITT_WORD(name, word, ...) word,
constexpr std::array kWords = {SVITT_SETS(SVITT_WORD)};  // as in Isa
#undef SVITT_WORD

/// Whether VDPBF16PS beats widening bf16 to fp32. Intel's cores with AMX, where a machine hides it,
/// issue one in two cycles but two fp32 multiply-adds in one: 115 GFLOP/s beside 230 on a Xeon at
/// 3.6 GHz, cross_attention over 1,569 keys 78 beside 108. On AMD's Zen 4 it takes 0.63 of the time
/// of widening, block_sparse_attention over 1,569 tokens 0.61, info_nce of 1,024 pairs 0.55.
bool pairs_pay() {
#if defined(__x86_64__)
  return !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

/// The best of this processor, or the lesser one that SVITT_CPU_CAPABILITY asks for.
Isa choose() {
  const Isa best = detect();
  const char* wanted = std::getenv("SVITT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0')
    return best == Isa::avx512_bf16 && !pairs_pay() ? Isa::avx512 : best;
  std::string words;
  for (size_t i = 0; i < kWords.size(); ++i) {
    if (wanted == std::string(kWords[i])) return std::min(best, static_cast<Isa>(i));
    words += std::string(i > 0 ? ", " : "") + kWords[i];
  }
  STD_TORCH_CHECK(false, "svitt_ops: SVITT_CPU_CAPABILITY must be one of ", words, ", got ",
                  wanted);
}

}  // namespace

Isa isa() {
  static const Isa best = choose();
  return best;
}

namespace {

std::string cpu_capability() { return kWords[static_cast<size_t>(isa())]; }

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&svitt::cpu_capability));
}
