// The table of a set of plain vectors.
#pragma once

#include "../common/contrast_tiles.h"
#include "../common/dispatch.h"
#include "finish.h"
#include "problem.h"
#include "sweep.h"

SVITT_ADD_KERNELS(QueueKernels,
                  {kPack, contrast_queue_centres, contrast_queue, contrast_queue_finish})
