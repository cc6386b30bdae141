// The table of a set of plain vectors.
#pragma once

#include "../common/contrast_tiles.h"
#include "../common/dispatch.h"
#include "rank.h"

SVITT_ADD_KERNELS(RankKernels, {{kPack, contrast_rank}})
