// Cross-attention for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx
#include "../common/dispatch.h"
#include "amx_backward.h"
#include "amx_forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(CrossKernels, {[](const CrossAttention& p) {
                                   return p.dtype == Dtype::bf16 && p.head_dim % 32 == 0;
                                 },
                                 partial_size, cross_forward_amx, cross_forward_join,
                                 cross_backward_amx, cross_backward_join})
#endif
