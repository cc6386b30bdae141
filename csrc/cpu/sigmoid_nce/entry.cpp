// The sigmoid loss on the CPU: loss and gradients by one sweep, the kernel of which is in weigh.h.
//
// Chunks of queries and tiles of keys as in InfoNCE: what belongs to a key is summed over the
// queries in their order, what belongs to a query over the tiles in theirs, and results are the
// same for any number of threads.

#include <cmath>
#include <tuple>
#include <vector>

#include "../../library.h"
#include "../common/contrast_host.h"
#include "../common/dispatch.h"
#include "problem.h"

namespace svitt {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_op(Tensor query, Tensor key,
                                                              Tensor temperature, Tensor bias,
                                                              OptionalTensor query_ids,
                                                              OptionalTensor key_ids,
                                                              int64_t first_row, bool gradients) {
  ContrastProblem<ContrastSigmoid> problem("sigmoid_nce", query, key, query_ids, key_ids,
                                           first_row);
  ContrastSigmoid& p = problem.p;
  set_temperature(p, temperature);
  p.bias = *bias.const_data_ptr<float>();
  if (!(std::fabs(p.bias) < kLogitLimit)) p.limit = -1.0f;
  const SigmoidKernels& k = choose<SigmoidKernels>(p);
  problem.pack(k, gradients);
  const double mean = 1.0 / static_cast<double>(p.keys), scale = p.scale;
  p.factor = static_cast<float>(mean * scale);
  const auto rows = [&](int64_t count) {
    return empty(query, {gradients ? count : 0, p.dim}, ScalarType::Float);
  };
  Tensor grad_query = rows(p.queries), grad_key = rows(p.keys);
  if (gradients) problem.want_gradients(k, grad_query, grad_key);
  std::vector<PairSums> sums(p.tiles());
  p.sums = sums.data();
  problem.sweep(k, k.weigh);
  PairSums all{};
  for (const PairSums& part : sums)
    all.loss += part.loss, all.moment += part.moment, all.weight += part.weight;
  const auto scalar = [&](double value) {
    Tensor to = empty(query, {}, ScalarType::Float);
    *to.mutable_data_ptr<float>() = static_cast<float>(value);
    return to;
  };
  // By the scale s = 1 / temperature, and from it to the temperature: -s s.
  return {scalar(all.loss * mean), grad_query, grad_key, scalar(-all.moment * mean * scale * scale),
          scalar(all.weight * mean)};
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CPU, m) {
  m.impl("sigmoid_nce", TORCH_BOX(&svitt::forward_op));
}
