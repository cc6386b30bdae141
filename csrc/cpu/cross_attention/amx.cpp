// Cross-attention for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx
#include "../common/dispatch.h"
#include "amx_backward.h"
#include "amx_forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(CrossKernels, {[](const CrossAttention& p) {
                                   if (p.head_dim % 32 != 0) return false;
                                   // Splitting K and V takes as long as products of few queries.
                                   // Both passes alike: a backward whose logits round otherwise
                                   // than those of the forward's lse loses digits.
                                   if (p.dtype == Dtype::f32) return p.queries >= 64;
                                   return p.dtype == Dtype::bf16;
                                 },
                                 partial_size, cross_forward_amx, cross_forward_join,
                                 cross_backward_amx, cross_backward_join})
#endif
