// Tensors of the stable ABI, as the attention ops allocate and read them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "attention.h"
#include "dtype.h"

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

/// Call a kernel over ranges of independent items.
template <class P>
void run(void (*kernel)(const P&, int64_t, int64_t), const P& p, int64_t items) {
  torch::stable::parallel_for(0, items, 1,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
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

inline void bind_inputs(AttentionInputs& p, const char* op, const Tensor& query, const Tensor& key,
                        const Tensor& value, double scale) {
  p.dtype = dtype(op, query);
  p.batch = query.size(0), p.heads = query.size(1);
  p.head_dim = static_cast<int>(query.size(3));
  p.query = matrix(query), p.key = matrix(key), p.value = matrix(value);
  p.scale = static_cast<float>(scale);
}

inline void bind_gradients(AttentionGradients& p, const Tensor& grad_out, const Tensor& out,
                           const Tensor& lse, Tensor& query, Tensor& key, Tensor& value) {
  p.grad_out = matrix(grad_out), p.out = matrix(out);
  p.lse = lse.const_data_ptr<double>();
  p.grad_query = query.mutable_data_ptr();
  p.grad_key = key.mutable_data_ptr();
  p.grad_value = value.mutable_data_ptr();
}

}  // namespace svitt
