// InfoNCE for avx2; see isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "info_nce.h"

#if defined(__x86_64__)
#define SVITT_LANES_8
SVITT_TARGET_BEGIN("avx2,fma,f16c")

namespace svitt::avx2 {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "info_nce_tiles.h"

#include "info_nce_forward.h"

#include "info_nce_backward.h"

#include "info_nce_search.h"

#include "info_nce_queue.h"

#include "info_nce_queue_finish.h"
}  // namespace svitt::avx2

SVITT_TARGET_END
#endif
