// Cross-attention for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx
#include "../common/dispatch.h"
#include "amx_backward.h"
#include "amx_forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(CrossKernels, {[](const CrossAttention& p) {
                                   return p.head_dim % 32 == 0 && (p.dtype == Dtype::bf16 || (p.dtype == Dtype::f32 && p.queries > 32));
                                 },
                                 partial_size, cross_forward_amx, cross_forward_join,
                                 cross_backward_amx, cross_backward_join})
#endif
