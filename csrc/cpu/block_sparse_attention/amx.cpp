// Block-sparse attention for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx
#include "../common/dispatch.h"
#include "pair_backward.h"
#include "pair_forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(BlockSparseKernels,
                  {[](const Attention& p) { return p.dtype != Dtype::f16 && p.head_dim % 32 == 0; },
                   forward_pairs, backward_pairs})
#endif
