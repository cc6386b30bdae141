// The sigmoid loss for AVX512-BF16.
#if defined(__x86_64__)
#define SVITT_ISA avx512_bf16
#include "pairs.h"
#endif
