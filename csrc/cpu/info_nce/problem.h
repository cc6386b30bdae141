// What the dispatcher hands to the kernels of each instruction set.
#pragma once

#include <cstdint>

#include "../common/contrast.h"

namespace svitt {

struct ContrastForward : Contrast {
  Tally* row_parts;  // (tiles, chunk_rows) of the current chunk
  Tally* of_keys;    // (keys), over all chunks so far
};

struct ContrastBackward : ContrastGradient {
  // Statistics of the forward, (6, queries) and (6, keys); `of_columns` null in one direction.
  const double *of_rows, *of_columns;
  float centre;     // a typical similarity, see `weigh`
  float smoothing;  // label smoothing over the number of choices
  float label_smoothing;
  double* grad_scale;  // (tiles)
};

struct InfoNceKernels : GradientKernels {
  void (*forward)(const ContrastForward& p, int64_t chunk, int64_t begin, int64_t end);
  void (*backward)(const ContrastBackward& p, int64_t chunk, int64_t begin, int64_t end);
};

}  // namespace svitt
