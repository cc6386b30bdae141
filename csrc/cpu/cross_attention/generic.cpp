// Cross-attention for generic; see common/isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "problem.h"

#define SVITT_LANES_4

namespace svitt::generic {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "tiles.h"

#include "forward.h"

#include "backward.h"
}  // namespace svitt::generic
