// What the dispatcher hands to the kernels of each instruction set.
#pragma once

#include <cstdint>

#include "../common/contrast.h"

namespace svitt {

struct ContrastSample : Contrast {
  const double* uniform;  // (queries)
  int64_t* found;         // (queries)
};

struct SampleKernels : PackKernels {
  void (*sample)(const ContrastSample& p, int64_t begin, int64_t end);
};

}  // namespace svitt
