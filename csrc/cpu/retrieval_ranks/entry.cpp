// Retrieval ranks on the CPU; the kernel is in rank.h.

#include <torch/csrc/stable/library.h>

#include "../common/contrast_host.h"
#include "../common/dispatch.h"
#include "problem.h"

namespace svitt {
namespace {

Tensor retrieval_ranks(Tensor query, Tensor key, OptionalTensor query_ids, OptionalTensor key_ids) {
  ContrastProblem<ContrastRank> problem("retrieval_ranks", query, key, query_ids, key_ids);
  ContrastRank& p = problem.p;
  const RankKernels& k = choose<RankKernels>(p);
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
