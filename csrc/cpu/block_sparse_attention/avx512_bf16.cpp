// Block-sparse attention for AVX512-BF16.
#if defined(__x86_64__)
#define SVITT_ISA avx512_bf16
#include "../common/dispatch.h"
#include "pair_backward.h"
#include "pair_forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(BlockSparseKernels, {[](const Attention& p) {
                                         return p.dtype == Dtype::bf16 && p.head_dim % 32 == 0;
                                       },
                                       forward_pairs, backward_pairs})
#endif
