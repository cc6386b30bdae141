// Cross-attention for avx2; see common/isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "problem.h"

#if defined(__x86_64__)
#define SVITT_LANES_8
SVITT_TARGET_BEGIN("avx2,fma,f16c")

namespace svitt::avx2 {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "tiles.h"

#include "forward.h"

#include "backward.h"
}  // namespace svitt::avx2

SVITT_TARGET_END
#endif
