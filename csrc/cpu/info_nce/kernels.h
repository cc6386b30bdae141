// The table of a set of plain vectors.
#pragma once

#include "../common/contrast_tiles.h"
#include "../common/dispatch.h"
#include "backward.h"
#include "forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(InfoNceKernels, {kPack, contrast_forward, contrast_backward_keys,
                                   contrast_backward_queries, contrast_write_keys})
