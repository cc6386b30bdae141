// Block-sparse attention for generic; see isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "block_sparse_attention.h"

#define SVITT_LANES_4

namespace svitt::generic {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "block_sparse_attention_tiles.h"

#include "block_sparse_attention_bias.h"

#include "block_sparse_attention_forward.h"

#include "block_sparse_attention_backward.h"
}  // namespace svitt::generic
