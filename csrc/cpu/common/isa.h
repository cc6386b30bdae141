// The instruction sets, and how kernel code is compiled for each and chosen at run time.
//
// A source file defines SVITT_ISA as the name of a set before it includes kernel code; an editor
// that opens a header alone sees it for the generic one. Kernel code stands between
// SVITT_KERNELS_BEGIN and SVITT_KERNELS_END, in namespace svitt::SVITT_ISA, with all includes
// before. Of the standard library it has what is included here and instantiates nothing, so that
// the linker can never merge a function built for a newer processor into code that an older one
// runs.
//
// A new set is named here alone, and has one file in the folder of each op that gains by it; the
// others run the best of the sets before it (dispatch.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#define SVITT_CPU_HAS(feature) __builtin_cpu_supports(feature)
#else
#define SVITT_CPU_HAS(feature) false
#endif

// Each with its word in SVITT_CPU_CAPABILITY, and whether a processor that has all before has it.
#define SVITT_SETS(SET) \
  SET(generic, "generic", true) \
  SET(avx2, "avx2", SVITT_CPU_HAS("avx2") && SVITT_CPU_HAS("fma")) \
  SET(avx512, "avx512", \
      SVITT_CPU_HAS("avx512f") && SVITT_CPU_HAS("avx512bw") && SVITT_CPU_HAS("avx512dq") && \
          SVITT_CPU_HAS("avx512vl")) \
  SET(avx512_bf16, "avx512_bf16", SVITT_CPU_HAS("avx512bf16")) \
  SET(amx, "avx512+amx", amx_usable())

// Floats in a vector, and what the compiler may use.
#define SVITT_LANES_generic 4
#define SVITT_TARGET_generic
#define SVITT_LANES_avx2 8
#define SVITT_TARGET_avx2 SVITT_TARGET("avx2,fma,f16c")
#define SVITT_LANES_avx512 16
#define SVITT_TARGET_avx512 SVITT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define SVITT_LANES_avx512_bf16 16
#define SVITT_TARGET_avx512_bf16 \
  SVITT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define SVITT_LANES_amx 16
#define SVITT_TARGET_amx \
  SVITT_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")

// Whether a set has matrix tiles.
#define SVITT_TILES_generic 0
#define SVITT_TILES_avx2 0
#define SVITT_TILES_avx512 0
#define SVITT_TILES_avx512_bf16 0
#define SVITT_TILES_amx 1

#ifndef SVITT_ISA
#define SVITT_ISA generic
#endif

#define SVITT_JOIN_(a, b) a##b
#define SVITT_JOIN(a, b) SVITT_JOIN_(a, b)
#define SVITT_LANES SVITT_JOIN(SVITT_LANES_, SVITT_ISA)
#define SVITT_TILES SVITT_JOIN(SVITT_TILES_, SVITT_ISA)

#define SVITT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SVITT_PUSH SVITT_PRAGMA(clang attribute push)
#define SVITT_TARGET(features) \
  SVITT_PRAGMA(clang attribute(__attribute__((target(features))), apply_to = function))
#define SVITT_POP SVITT_PRAGMA(clang attribute pop)
#else
#define SVITT_PUSH SVITT_PRAGMA(GCC push_options)
#define SVITT_TARGET(features) SVITT_PRAGMA(GCC target(features))
#define SVITT_POP SVITT_PRAGMA(GCC pop_options)
#endif
#define SVITT_KERNELS_BEGIN \
  SVITT_PUSH SVITT_JOIN(SVITT_TARGET_, SVITT_ISA) namespace svitt::SVITT_ISA {
#define SVITT_KERNELS_END \
  } \
  SVITT_POP

#define SVITT_INLINE inline __attribute__((always_inline))

namespace svitt {

#define SVITT_NAME(name, ...) name,
enum class Isa { SVITT_SETS(SVITT_NAME) };
#undef SVITT_NAME

/// The best instruction set that this processor has, or the lesser one that was asked for.
Isa isa();

}  // namespace svitt
