// Hard negatives on the CPU; the kernel is in sample.h.

#include <torch/csrc/stable/library.h>

#include "../common/contrast_host.h"
#include "../common/dispatch.h"
#include "problem.h"

namespace svitt {
namespace {

Tensor sample_hard_negatives(Tensor query, Tensor key, Tensor temperature, OptionalTensor query_ids,
                             OptionalTensor key_ids, Tensor uniform) {
  ContrastProblem<ContrastSample> problem("sample_hard_negatives", query, key, query_ids, key_ids);
  ContrastSample& p = problem.p;
  const SampleKernels& k = choose<SampleKernels>(p);
  Tensor found = empty(query, {p.queries}, ScalarType::Long);
  set_temperature(p, temperature);
  p.uniform = uniform.const_data_ptr<double>();
  p.found = found.mutable_data_ptr<int64_t>();
  problem.pack(k, false);
  parallel_for(0, p.queries, kGrain, [&](int64_t a, int64_t b) { k.sample(p, a, b); });
  return found;
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(svitt_ops, CPU, m) {
  m.impl("sample_hard_negatives", TORCH_BOX(&svitt::sample_hard_negatives));
}
