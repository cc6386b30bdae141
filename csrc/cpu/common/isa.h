// One kernel source, compiled once per instruction set and chosen at run time.
//
// A translation unit defines SVITT_ISA as avx512, avx2 or generic, includes this header, opens
// the target region with SVITT_TARGET_BEGIN and only then includes kernel code. Kernel code lives
// in namespace svitt::SVITT_ISA and instantiates nothing of the standard library, so that the
// linker can never merge a function built for a newer processor into code that an older one runs.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SVITT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SVITT_TARGET_BEGIN(isa) \
  SVITT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define SVITT_TARGET_END SVITT_PRAGMA(clang attribute pop)
#else
#define SVITT_TARGET_BEGIN(isa) SVITT_PRAGMA(GCC push_options) SVITT_PRAGMA(GCC target(isa))
#define SVITT_TARGET_END SVITT_PRAGMA(GCC pop_options)
#endif

#define SVITT_INLINE inline __attribute__((always_inline))

namespace svitt {

enum class Isa { generic, avx2, avx512, amx };

/// The best instruction set that both this processor and this build have.
Isa isa();

}  // namespace svitt
