// InfoNCE for avx2; see common/isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "../common/contrast.h"

#if defined(__x86_64__)
#define SVITT_LANES_8
SVITT_TARGET_BEGIN("avx2,fma,f16c")

namespace svitt::avx2 {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "../common/contrast_tiles.h"

#include "forward.h"

#include "backward.h"

#include "../sample_hard_negatives/sample.h"

#include "../queue_info_nce/sweep.h"

#include "../queue_info_nce/finish.h"
}  // namespace svitt::avx2

SVITT_TARGET_END
#endif
