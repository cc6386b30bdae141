// Hard negatives on the CPU; the kernel is in sample.h.

#include "../../library.h"
#include "../common/contrast_host.h"

namespace svitt {
namespace {

Tensor sample_hard_negatives(Tensor query, Tensor key, Tensor temperature, OptionalTensor query_ids,
                             OptionalTensor key_ids, Tensor uniform) {
  ContrastProblem<ContrastSearch> problem("sample_hard_negatives", query, key, query_ids, key_ids);
  set_temperature(problem.p, temperature);
  problem.p.uniform = uniform.const_data_ptr<double>();
  return search<SampleKernels>(problem, query);
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CPU, m) {
  m.impl("sample_hard_negatives", TORCH_BOX(&svitt::sample_hard_negatives));
}
