// Cross-attention for generic; see isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "cross_attention.h"

#define SVITT_LANES_4

namespace svitt::generic {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "cross_attention_tiles.h"

#include "cross_attention_forward.h"

#include "cross_attention_backward.h"
}  // namespace svitt::generic
