// InfoNCE for avx512; see common/isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "../common/contrast.h"

#if defined(__x86_64__)
#define SVITT_LANES_16
SVITT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace svitt::avx512 {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "../common/contrast_tiles.h"

#include "forward.h"

#include "backward.h"

#include "../sample_hard_negatives/sample.h"

#include "../queue_info_nce/sweep.h"

#include "../queue_info_nce/finish.h"
}  // namespace svitt::avx512

SVITT_TARGET_END
SVITT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")

namespace svitt::avx512 {
#include "../common/amx.h"

#include "../common/amx_contrast.h"

#include "../queue_info_nce/amx.h"
}  // namespace svitt::avx512

SVITT_TARGET_END
#endif
