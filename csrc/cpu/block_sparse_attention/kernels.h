// The table of a set of plain vectors.
#pragma once

#include "../common/dispatch.h"
#include "backward.h"
#include "forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(BlockSparseKernels, {nullptr, forward, backward})
