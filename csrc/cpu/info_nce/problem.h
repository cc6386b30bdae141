// What the dispatcher hands to the kernels of each instruction set.
#pragma once

#include <cstdint>

#include "../common/contrast.h"
#include "../common/dtype.h"

namespace svitt {

struct ContrastForward : Contrast {
  Tally* row_parts;  // (tiles, chunk_rows) of the current chunk
  Tally* of_keys;    // (keys), over all chunks so far
};

struct ContrastBackward : Contrast {
  // Statistics of the forward, (5, queries) and (5, keys); `of_columns` null in one direction.
  const double *of_rows, *of_columns;
  float centre;     // a typical similarity, see `weigh`
  float smoothing;  // label smoothing over the number of choices
  float label_smoothing;
  float factor;  // of the result: upstream gradient, mean, scale

  // `query_panels`, `key_panels`: rows cut into panels of dims, B of products that sum over rows.
  float *query_panels, *key_panels;
  float* grads;                     // (tiles, chunk_rows, kGradStride) of the current chunk
  uint16_t* rounded;                // or (tiles, chunk_rows, kRoundedStride), in bf16
  double* grad_scale;               // (tiles)
  float *grad_keys, *grad_queries;  // (padded keys, padded dim), (chunk_rows, padded dim)
  void *grad_query, *grad_key;      // contiguous
  Dtype grad_dtype;
};

struct InfoNceKernels : PackKernels {
  void (*forward)(const ContrastForward& p, int64_t chunk, int64_t begin, int64_t end);
  void (*backward_keys)(const ContrastBackward& p, int64_t chunk, int64_t begin, int64_t end);
  void (*backward_queries)(const ContrastBackward& p, int64_t chunk, int64_t begin, int64_t end);
  void (*write_keys)(const ContrastBackward& p, int64_t begin, int64_t end);
};

}  // namespace svitt
