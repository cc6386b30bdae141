// Block-sparse attention for avx512; see isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "block_sparse_attention.h"

#if defined(__x86_64__)
#define SVITT_LANES_16
SVITT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace svitt::avx512 {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "block_sparse_attention_tiles.h"

#include "block_sparse_attention_bias.h"

#include "block_sparse_attention_forward.h"

#include "block_sparse_attention_backward.h"
}  // namespace svitt::avx512

SVITT_TARGET_END
SVITT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")

namespace svitt::avx512 {
#include "../common/amx.h"

#include "../common/amx_parts.h"

#include "../common/amx_products.h"

#include "block_sparse_attention_amx.h"

#include "block_sparse_attention_backward_amx.h"
}  // namespace svitt::avx512

SVITT_TARGET_END
#endif
