// The table of a set that multiplies pairs of bf16.
#pragma once

#include "../common/pair_gradient.h"

#include "../common/dispatch.h"
#include "problem.h"
#include "weigh.h"

SVITT_KERNELS_BEGIN

inline void contrast_sigmoid_pairs(const ContrastSigmoid& p, int64_t chunk, int64_t begin,
                                   int64_t end) {
  weigh_pairs<PairGradientProducts, SigmoidWeights>(p, chunk, begin, end);
}

SVITT_KERNELS_END

SVITT_ADD_KERNELS(SigmoidKernels, {kPairGradient, contrast_sigmoid_pairs})
