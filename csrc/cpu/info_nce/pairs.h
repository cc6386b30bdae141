// The table of a set that multiplies pairs of bf16.
#pragma once

#include "../common/pair_gradient.h"

#include "../common/dispatch.h"
#include "backward.h"
#include "forward.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

inline void contrast_forward_pairs(const ContrastForward& p, int64_t chunk, int64_t begin,
                                   int64_t end) {
  const TileRegisters registers;
  with_pairs(p.dtype, [&](auto x) {
    forward_tiles<kPairRows>(p, chunk, begin, end, [&](DotTile& t) {
      compute_pairs<decltype(x)>(t, p.tiled_queries, p.tiled_keys);
    });
  });
}

inline void contrast_backward_pairs(const ContrastBackward& p, int64_t chunk, int64_t begin,
                                    int64_t end) {
  weigh_pairs<PairGradientProducts, SoftmaxWeights>(p, chunk, begin, end);
}

SVITT_KERNELS_END

SVITT_ADD_KERNELS(InfoNceKernels, {kPairGradient, contrast_forward_pairs, contrast_backward_pairs})
