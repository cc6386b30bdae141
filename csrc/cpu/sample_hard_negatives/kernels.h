// The table of a set of plain vectors.
#pragma once

#include "../common/contrast_tiles.h"
#include "../common/dispatch.h"
#include "sample.h"

SVITT_ADD_KERNELS(SampleKernels, {{kPack, contrast_sample}})
