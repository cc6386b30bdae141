// Retrieval ranks on the CPU; the kernel is in rank.h.

#include "../../library.h"
#include "../common/contrast_host.h"

namespace svitt {
namespace {

Tensor retrieval_ranks(Tensor query, Tensor key, OptionalTensor query_ids, OptionalTensor key_ids) {
  ContrastProblem<ContrastSearch> problem("retrieval_ranks", query, key, query_ids, key_ids);
  return search<RankKernels>(problem, query);
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CPU, m) {
  m.impl("retrieval_ranks", TORCH_BOX(&svitt::retrieval_ranks));
}
