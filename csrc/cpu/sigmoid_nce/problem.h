// What the dispatcher hands to the kernels of each instruction set.
#pragma once

#include <cstdint>

#include "../common/contrast.h"

namespace svitt {

/// Sums over pairs: loss, weight times similarity, weight.
struct PairSums {
  double loss, moment, weight;
};

struct ContrastSigmoid : ContrastGradient {
  float bias;
  PairSums* sums;  // (tiles)
};

struct SigmoidKernels : GradientKernels {
  void (*weigh)(const ContrastSigmoid& p, int64_t chunk, int64_t begin, int64_t end);
};

}  // namespace svitt
