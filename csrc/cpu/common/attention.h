// What the attention ops hand to their kernels alike.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace svitt {

struct Matrix {  // (batch, heads, tokens, head_dim), last stride 1, strides in elements
  const void* data;
  int64_t batch, head, token;
};

struct AttentionInputs {
  Dtype dtype;
  int64_t batch, heads;
  int head_dim;
  Matrix query, key, value;
  float scale;
};

/// Of a backward. Results are (batch, tokens, heads, head_dim) contiguous.
struct AttentionGradients {
  Matrix grad_out, out;
  const double* lse;
  void *grad_query, *grad_key, *grad_value;
};

}  // namespace svitt
