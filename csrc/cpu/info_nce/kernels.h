// The table of a set of plain vectors.
#pragma once

#include "../common/contrast_gradient.h"
#include "../common/dispatch.h"
#include "backward.h"
#include "forward.h"
#include "problem.h"

SVITT_ADD_KERNELS(InfoNceKernels, {kGradient, contrast_forward, contrast_backward})
