// Block-sparse attention for avx2; see isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "block_sparse_attention.h"

#if defined(__x86_64__)
#define SVITT_LANES_8
SVITT_TARGET_BEGIN("avx2,fma,f16c")

namespace svitt::avx2 {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "block_sparse_attention_tiles.h"

#include "block_sparse_attention_bias.h"

#include "block_sparse_attention_forward.h"

#include "block_sparse_attention_backward.h"
}  // namespace svitt::avx2

SVITT_TARGET_END
#endif
