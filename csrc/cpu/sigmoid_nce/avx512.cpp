// The sigmoid loss for AVX-512.
#if defined(__x86_64__)
#define SVITT_ISA avx512
#include "kernels.h"
#endif
