// InfoNCE for generic; see common/isa.h for why the kernels are included, not linked.
#include "../common/isa.h"
#include "../common/contrast.h"

#define SVITT_LANES_4

namespace svitt::generic {
#include "../common/simd.h"

#include "../common/gemm.h"

#include "../common/arena.h"

#include "../common/contrast_tiles.h"

#include "forward.h"

#include "backward.h"

#include "../sample_hard_negatives/sample.h"

#include "../queue_info_nce/sweep.h"

#include "../queue_info_nce/finish.h"
}  // namespace svitt::generic
