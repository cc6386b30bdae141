// The table of a set that multiplies pairs of bf16.
#pragma once

#include "../common/pair_contrast.h"

#include "../common/dispatch.h"
#include "sample.h"

SVITT_KERNELS_BEGIN

inline void contrast_sample_pairs(const ContrastSearch& p, int64_t begin, int64_t end) {
  search_pairs(p, begin, end, [&](int64_t first, int64_t last, const auto& compute) {
    sample_queries<kPairRows, kTileRows>(p, first, last, compute);
  });
}

SVITT_KERNELS_END

SVITT_ADD_KERNELS(SampleKernels, {{kPairPack, contrast_sample_pairs}})
