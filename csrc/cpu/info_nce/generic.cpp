// InfoNCE for generic; see isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "info_nce.h"

#define SVITT_LANES_4

namespace svitt::generic {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "info_nce_tiles.h"

#include "info_nce_forward.h"

#include "info_nce_backward.h"

#include "info_nce_search.h"

#include "info_nce_queue.h"

#include "info_nce_queue_finish.h"
}  // namespace svitt::generic
