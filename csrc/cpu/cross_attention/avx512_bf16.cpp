// Cross-attention for AVX512-BF16.
#if defined(__x86_64__)
#define SVITT_ISA avx512_bf16
#include "../common/dispatch.h"
#include "avx512_bf16_backward.h"
#include "avx512_bf16_forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(CrossKernels, {[](const CrossAttention& p) {
                                   return p.dtype == Dtype::bf16 && p.head_dim % 32 == 0;
                                 },
                                 partial_size, cross_forward_pairs, cross_forward_join,
                                 cross_backward_pairs, cross_backward_join})
#endif
