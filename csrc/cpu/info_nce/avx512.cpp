// InfoNCE for avx512; see isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "info_nce.h"

#if defined(__x86_64__)
#define SVITT_LANES_16
SVITT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace svitt::avx512 {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "info_nce_tiles.h"

#include "info_nce_forward.h"

#include "info_nce_backward.h"

#include "info_nce_search.h"

#include "info_nce_queue.h"

#include "info_nce_queue_finish.h"
}  // namespace svitt::avx512

SVITT_TARGET_END
SVITT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")

namespace svitt::avx512 {
#include "../common/amx.h"

#include "info_nce_amx.h"

#include "info_nce_queue_amx.h"
}  // namespace svitt::avx512

SVITT_TARGET_END
#endif
