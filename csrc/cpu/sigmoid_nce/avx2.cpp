// The sigmoid loss for AVX2.
#if defined(__x86_64__)
#define SVITT_ISA avx2
#include "kernels.h"
#endif
