// Tensors of the stable ABI, as the attention ops allocate and read them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "attention.h"

namespace svitt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

inline Tensor empty(const Tensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = {}) {
  return torch::stable::new_empty(like, sizes, dtype);
}

/// (batch, heads, tokens, head_dim) over memory laid out (batch, tokens, heads, head_dim).
inline Tensor empty_like_heads(const Tensor& x) {
  return torch::stable::transpose(empty(x, {x.size(0), x.size(2), x.size(1), x.size(3)}), 1, 2);
}

inline Matrix matrix(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline Dtype dtype(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, op, ": dtype must be float32, float16 or bfloat16");
  }
}

}  // namespace svitt
