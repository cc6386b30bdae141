// The table of a set of plain vectors.
#pragma once

#include "../common/contrast_gradient.h"
#include "../common/dispatch.h"
#include "problem.h"
#include "weigh.h"

SVITT_ADD_KERNELS(SigmoidKernels, {kGradient, contrast_sigmoid})
