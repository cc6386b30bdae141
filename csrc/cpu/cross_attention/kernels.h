// The table of a set of plain vectors.
#pragma once

#include "../common/dispatch.h"
#include "backward.h"
#include "forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(CrossKernels, {nullptr, partial_size, cross_forward, cross_forward_join,
                                 cross_backward, cross_backward_join})
