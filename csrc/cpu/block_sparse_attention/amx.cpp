// Block-sparse attention for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx
#include "../common/dispatch.h"
#include "amx_backward.h"
#include "amx_forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(BlockSparseKernels,
                  {[](const Attention& p) { return p.dtype != Dtype::f16 && p.head_dim % 32 == 0; },
                   forward_amx, backward_amx})
#endif
