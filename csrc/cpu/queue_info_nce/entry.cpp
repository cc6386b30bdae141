// InfoNCE against a batch and a queue on the CPU; the kernel is in sweep.h.

#include <tuple>

#include "../../library.h"
#include "../common/contrast_host.h"
#include "../common/dispatch.h"
#include "problem.h"

namespace svitt {
namespace {

constexpr int64_t kItems = 64;         // enough for the threads of a large machine
constexpr int64_t kTilesPerSplit = 8;  // with 4, sums of 256 queries cost a quarter of all time

std::tuple<Tensor, Tensor, Tensor> forward_op(Tensor query, Tensor key, Tensor queue,
                                              Tensor temperature, OptionalTensor teacher_query,
                                              double alpha, OptionalTensor query_ids,
                                              OptionalTensor key_ids, OptionalTensor queue_ids,
                                              bool gradients) {
  ContrastProblem<ContrastQueue> problem("queue_info_nce", query, key, query_ids, key_ids);
  ContrastQueue& p = problem.p;
  const QueueKernels& k = choose<QueueKernels>(p);
  p.queue = queue.const_data_ptr(), p.queue_rows = queue.size(0), p.queue_step = queue.stride(0);
  set_temperature(p, temperature);
  p.alpha = alpha, p.gradients = gradients;
  std::vector<int32_t> of_queue;
  if (query_ids.has_value() && queue_ids.has_value())
    of_queue = problem.ids->number(*queue_ids), p.queue_ids = of_queue.data();
  const auto pack = [&](Contrast& of) {
    problem.pack_queries(k, of);
    if (k.tiles != nullptr)
      of.tiled_queries = problem.pack_tiles(k, of.query, of.query_step, of.queries, problem.kPlain);
  };
  pack(p);
  if (teacher_query.has_value()) {
    Contrast taught = p;
    taught.query = teacher_query->const_data_ptr(), taught.query_step = teacher_query->stride(0);
    pack(taught);
    p.teacher = taught.rows, p.teacher_step = taught.row_step;
    p.tiled_teacher = taught.tiled_queries;
  }

  const int64_t chunks = p.chunks(), tiles = p.all_tiles();
  p.splits = std::max<int64_t>(1, std::min(kItems / chunks, tiles / kTilesPerSplit));
  Tensor loss = empty(query, {}, ScalarType::Float),
         grad = empty(query, {gradients ? p.queries : 0, p.dim}, ScalarType::Float),
         grad_temperature = empty(query, {}, ScalarType::Float);
  const Buffer centres(2 * p.queries),
      sums(gradients ? p.splits * p.distributions() * p.padded_queries() * p.padded_dim() : 0);
  std::vector<QueueTally> tallies(p.splits * p.queries);
  std::vector<double> losses(p.queries), moments(p.queries);
  p.centres = centres.get(), p.teacher_centres = p.centres + p.queries;
  p.tallies = tallies.data(), p.sums = sums.get(), p.grad = grad.mutable_data_ptr<float>();
  p.losses = losses.data(), p.moments = moments.data();
  parallel_for(0, p.queries, kGrain, [&](int64_t a, int64_t b) { k.centres(p, a, b); });
  parallel_for(0, chunks * p.splits, 1, [&](int64_t a, int64_t b) { k.sweep(p, a, b); });
  parallel_for(0, p.queries, 4, [&](int64_t a, int64_t b) { k.finish(p, a, b); });
  double sum = 0.0, moment = 0.0;
  for (int64_t i = 0; i < p.queries; ++i) sum += losses[i], moment += moments[i];
  const double scale = p.scale, count = static_cast<double>(p.queries);
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum / count);
  // By the scale s = 1 / temperature, and from it to the temperature: -s s.
  *grad_temperature.mutable_data_ptr<float>() = static_cast<float>(-scale * scale * moment / count);
  return {loss, grad, grad_temperature};
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CPU, m) {
  m.impl("queue_info_nce", TORCH_BOX(&svitt::forward_op));
}
