// Block-sparse attention on the CPU: registration, allocation and the choice of instruction set.
//
// Shapes, dtypes and the layout's indices were checked in Python; what torch.compile may have
// skipped there and could read out of bounds (position codes) is checked again here.

#include "problem.h"

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "../../library.h"
#include "../common/dispatch.h"
#include "../common/tensors.h"

namespace svitt {
namespace {

void check_codes(const Attention& p, const Tensor& codes) {
  const int64_t tokens = p.num_tokens(), reach = (p.table_rows - 1) / 2;
  for (int64_t b = 0; b < codes.size(0) && tokens > 0; ++b) {
    const auto [low, high] = std::minmax_element(p.codes + b * tokens, p.codes + (b + 1) * tokens);
    STD_TORCH_CHECK(static_cast<int64_t>(*high) - *low <= reach,
                    "block_sparse_attention: position_codes must differ by at most ", reach,
                    " for this bias_table, got a difference of ",
                    static_cast<int64_t>(*high) - *low);
  }
}

constexpr int64_t kTableGrain = 1024;  // rows of a table worth a thread

/// Where row r of a table stands once rearranged, see kTablePad.
int64_t rearranged(const Attention& p, int64_t r, bool reversed) {
  if (r >= p.table_rows) return p.extra() + r - p.table_rows;
  return kTablePad + (reversed ? p.table_rows - 1 - r : r);
}

/// Rearrange the table for the kernels; `tables` owns the result.
void bind_bias(Attention& p, const OptionalTensor& table, const OptionalTensor& codes,
               bool reversed, std::unique_ptr<float[]>& tables) {
  if (!table.has_value()) return;
  const int64_t rows = table->size(0);
  p.table_rows = rows - 2 * p.num_global - static_cast<int64_t>(p.num_global) * p.num_global;
  p.table_stride = rows + 2 * kTablePad;
  p.codes = p.num_tokens() > 0 ? codes->const_data_ptr<int32_t>() : nullptr;
  p.codes_stride = codes->size(0) > 1 ? codes->size(1) : 0;
  check_codes(p, *codes);
  tables.reset(new float[p.heads * p.table_stride]);
  p.table = tables.get();
  float* to = tables.get();
  for (int64_t h = 0; h < p.heads; ++h) {
    std::fill_n(to + h * p.table_stride, kTablePad, 0.0f);
    std::fill_n(to + h * p.table_stride + p.table_rows + kTablePad, kTablePad, 0.0f);
  }
  const float* from = table->const_data_ptr<float>();
  torch::stable::parallel_for(0, rows, kTableGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = rearranged(p, r, reversed);
      for (int64_t h = 0; h < p.heads; ++h) to[h * p.table_stride + at] = from[r * p.heads + h];
    }
  });
}

/// Sum the rearranged partial gradients over the batch, in order, back into (rows, heads).
Tensor reduce_table(const Backward& p, const Tensor& table) {
  Tensor result = empty(table, {table.size(0), table.size(1)});
  float* to = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, table.size(0), kTableGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* from = p.grad_table + rearranged(p, r, false);
      for (int64_t h = 0; h < p.heads; ++h) {
        float sum = 0.0f;
        for (int64_t b = 0; b < p.batch; ++b) sum += from[(b * p.heads + h) * p.table_stride];
        to[r * p.heads + h] = sum;
      }
    }
  });
  return result;
}

template <class P>
P problem(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_counts,
          const Tensor& key_blocks, int64_t block_size, int64_t num_global,
          const OptionalTensor& lengths, double scale) {
  P p{};
  bind_inputs(p, "block_sparse_attention", query, key, value, scale);
  p.tokens = query.size(2);
  p.block_size = static_cast<int>(block_size), p.num_global = static_cast<int>(num_global);
  p.blocks = key_counts.size(2);
  const int64_t rows = p.blocks, heads = key_counts.size(1);
  p.keys = {key_counts.const_data_ptr<int32_t>(), key_blocks.const_data_ptr<int32_t>(),
            key_counts.size(0) > 1 ? heads * rows : 0, heads > 1 ? rows : 0, key_blocks.size(3)};
  p.lengths = lengths.has_value() ? lengths->const_data_ptr<int32_t>() : nullptr;
  return p;
}

std::tuple<Tensor, Tensor, Tensor> forward_op(
    Tensor query, Tensor key, Tensor value, Tensor key_counts, Tensor key_blocks, Tensor, Tensor,
    int64_t block_size, int64_t num_global, OptionalTensor bias_table,
    OptionalTensor position_codes, OptionalTensor key_lengths, double scale, bool return_saliency) {
  auto p = problem<Forward>(query, key, value, key_counts, key_blocks, block_size, num_global,
                            key_lengths, scale);
  std::unique_ptr<float[]> tables;
  bind_bias(p, bias_table, position_codes, true, tables);
  Tensor out = empty_like_heads(query);
  Tensor lse = empty(query, {p.batch, p.heads, p.tokens}, ScalarType::Double);
  Tensor saliency =
      empty(query, return_saliency ? Sizes{p.batch, p.num_tokens()} : Sizes{0}, ScalarType::Float);
  std::vector<float> rows(return_saliency ? p.batch * p.heads * p.num_tokens() : 0);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<double>();
  p.saliency = return_saliency ? rows.data() : nullptr;

  run(choose<BlockSparseKernels>(p).forward, p, p.batch * p.heads * p.row_blocks());

  if (return_saliency) {
    float* mean = saliency.mutable_data_ptr<float>();
    const int64_t tokens = p.num_tokens();
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t n = 0; n < tokens; ++n) {
        float sum = 0.0f;
        for (int64_t h = 0; h < p.heads; ++h) sum += rows[(b * p.heads + h) * tokens + n];
        mean[b * tokens + n] = sum / static_cast<float>(p.heads);
      }
  }
  return {out, lse, saliency};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse,
    Tensor key_counts, Tensor key_blocks, Tensor, Tensor, int64_t block_size, int64_t num_global,
    OptionalTensor bias_table, OptionalTensor position_codes, OptionalTensor key_lengths,
    double scale) {
  auto p = problem<Backward>(query, key, value, key_counts, key_blocks, block_size, num_global,
                             key_lengths, scale);
  std::unique_ptr<float[]> tables;
  bind_bias(p, bias_table, position_codes, false, tables);
  Tensor grad_query = empty_like_heads(query), grad_key = empty_like_heads(query),
         grad_value = empty_like_heads(query);
  std::vector<float> grad_tables(p.table == nullptr ? 0 : p.batch * p.heads * p.table_stride);
  bind_gradients(p, grad_out, out, lse, grad_query, grad_key, grad_value);
  p.grad_table = p.table == nullptr ? nullptr : grad_tables.data();

  run(choose<BlockSparseKernels>(p).backward, p, p.batch * p.heads);
  Tensor grad_table =
      bias_table.has_value() ? reduce_table(p, *bias_table) : empty(query, {0}, ScalarType::Float);
  return {grad_query, grad_key, grad_value, grad_table};
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&svitt::forward_op));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&svitt::backward_op));
}
