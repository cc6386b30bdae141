// Retrieval ranks on the CPU; the kernel is in sample_hard_negatives/sample.h.

#include <torch/csrc/stable/library.h>

#include "../common/contrast_host.h"

namespace svitt {
namespace {

Tensor retrieval_ranks(Tensor query, Tensor key, OptionalTensor query_ids, OptionalTensor key_ids) {
  ContrastProblem<ContrastSearch> problem(query, key, query_ids, key_ids, 0);
  ContrastSearch& p = problem.p;
  const ContrastKernels k = contrast_kernels();
  Tensor found = empty(query, {p.queries}, ScalarType::Long);
  p.found = found.mutable_data_ptr<int64_t>();
  problem.pack(k, false);
  parallel_for(0, p.queries, kGrain, [&](int64_t a, int64_t b) { k.rank(p, a, b); });
  return found;
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(svitt_ops, CPU, m) {
  m.impl("retrieval_ranks", TORCH_BOX(&svitt::retrieval_ranks));
}
