// Cross-attention on the CPU: registration, allocation and the choice of instruction set.
//
// Shapes and dtypes were checked in Python.

#include "problem.h"

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "../../library.h"
#include "../common/dispatch.h"
#include "../common/pages.h"
#include "../common/tensors.h"

namespace svitt {
namespace {

// Parts that the keys of a head are cut into: enough items for many threads, of enough keys to be
// worth one. Of the shapes alone, so that results do not depend on the number of threads.
constexpr int64_t kItems = 64, kLeastKeys = 128;

int64_t count_parts(const CrossAttention& p) {
  const int64_t heads = p.batch * p.heads;
  if (heads == 0) return 1;
  return std::max<int64_t>(1, std::min((kItems + heads - 1) / heads, p.keys / kLeastKeys));
}

/// The keys that each sample attends.
struct Present {
  std::vector<int32_t> numbers;
  std::vector<int64_t> counts;

  void bind(CrossAttention& p, const OptionalTensor& mask) {
    if (!mask.has_value() || p.keys == 0) return;
    p.ignored = mask->const_data_ptr<bool>();
    numbers.resize(p.batch * p.keys);
    counts.resize(p.batch);
    for (int64_t b = 0; b < p.batch; ++b) {
      int32_t* to = numbers.data() + b * p.keys;
      int64_t count = 0;
      for (int64_t k = 0; k < p.keys; ++k) {
        to[count] = static_cast<int32_t>(k);
        count += !p.ignored[b * p.keys + k];
      }
      counts[b] = count;
    }
    p.present = numbers.data();
    p.counts = counts.data();
  }
};

template <class P>
P problem(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
          double scale, Present& present) {
  P p{};
  bind_inputs(p, "cross_attention", query, key, value, scale);
  p.queries = query.size(2), p.keys = key.size(2);
  p.parts = count_parts(p);
  present.bind(p, mask);
  return p;
}

/// Mean over the heads, in order, of what each key received.
void average_heads(const CrossForward& p, float* saliency) {
  // Mean over the queries too, or the one row of "cls"; without a query every sum is 0.
  const int64_t rows = p.saliency == Saliency::mean ? std::max<int64_t>(p.queries, 1) : 1;
  const float factor = 1.0f / static_cast<float>(std::max<int64_t>(p.heads, 1) * rows);
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float* to = saliency + b * p.keys;
      std::fill(to, to + p.keys, 0.0f);
      for (int64_t h = 0; h < p.heads; ++h) {
        const float* from = p.rows + (b * p.heads + h) * p.keys;
        for (int64_t k = 0; k < p.keys; ++k) to[k] += from[k];
      }
      for (int64_t k = 0; k < p.keys; ++k) to[k] *= factor;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward_op(Tensor query, Tensor key, Tensor value,
                                              OptionalTensor key_padding_mask, double scale,
                                              int64_t saliency) {
  Present present;
  auto p = problem<CrossForward>(query, key, value, key_padding_mask, scale, present);
  p.saliency = static_cast<Saliency>(saliency);
  const bool salient = p.saliency != Saliency::none;
  Tensor out = empty_like_heads(query);
  Tensor lse = empty(query, {p.batch, p.heads, p.queries}, ScalarType::Double);
  Tensor received = empty(query, salient ? Sizes{p.batch, p.keys} : Sizes{0}, ScalarType::Float);
  const int64_t heads = p.batch * p.heads;
  std::unique_ptr<float[]> rows(salient ? new float[heads * p.keys] : nullptr);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<double>();
  p.rows = rows.get();

  const CrossKernels& kernels = choose<CrossKernels>(p);
  std::unique_ptr<float[]> partials;
  if (p.parts > 1) {
    partials.reset(new float[heads * p.parts * kernels.partial_size(p)]);
    p.partials = partials.get();
  }
  run(kernels.forward, p, heads * p.parts);
  if (p.parts > 1) run(kernels.forward_join, p, heads);
  if (salient) average_heads(p, received.mutable_data_ptr<float>());
  return {out, lse, received};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(Tensor grad_out, Tensor query, Tensor key,
                                               Tensor value, Tensor out, Tensor lse,
                                               OptionalTensor key_padding_mask, double scale) {
  Present present;
  auto p = problem<CrossBackward>(query, key, value, key_padding_mask, scale, present);
  Tensor grad_query = empty_like_heads(query), grad_key = empty_like_heads(key),
         grad_value = empty_like_heads(value);
  for (const Tensor& x : {grad_key, grad_value})
    ask_for_huge_pages(x.mutable_data_ptr(), x.numel() * static_cast<int64_t>(x.element_size()));
  bind_gradients(p, grad_out, out, lse, grad_query, grad_key, grad_value);
  const int64_t heads = p.batch * p.heads;
  const CrossKernels& kernels = choose<CrossKernels>(p);
  std::unique_ptr<float[]> partials;
  if (p.parts > 1) {
    partials.reset(new float[heads * p.parts * p.queries * p.head_dim]);
    p.partials = partials.get();
  }
  run(kernels.backward, p, heads * p.parts);
  if (p.parts > 1) run(kernels.backward_join, p, heads);
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CPU, m) {
  m.impl("cross_attention", TORCH_BOX(&svitt::forward_op));
  m.impl("cross_attention_backward", TORCH_BOX(&svitt::backward_op));
}
