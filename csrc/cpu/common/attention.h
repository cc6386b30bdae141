// What the attention ops hand to their kernels alike.
#pragma once

#include <cstdint>

namespace svitt {

enum class Dtype { f32, bf16, f16 };

struct Matrix {  // (batch, heads, tokens, head_dim), last stride 1, strides in elements
  const void* data;
  int64_t batch, head, token;
};

}  // namespace svitt
