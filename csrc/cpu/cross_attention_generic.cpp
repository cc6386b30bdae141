// Cross-attention for generic; see isa.h for why the kernels are included, not linked.
#include "isa.h"
#include "cross_attention.h"

#define SVITT_LANES_4

namespace svitt::generic {
#include "simd.h"

#include "gemm.h"

#include "arena.h"

#include "cross_attention_tiles.h"

#include "cross_attention_forward.h"

#include "cross_attention_backward.h"
}  // namespace svitt::generic
