// What the dispatcher hands to the kernels of each instruction set.
#pragma once

#include <cstdint>

#include "../common/contrast.h"

namespace svitt {

struct ContrastRank : Contrast {
  int64_t* found;  // (queries)
};

struct RankKernels : PackKernels {
  void (*rank)(const ContrastRank& p, int64_t begin, int64_t end);
};

}  // namespace svitt
