// InfoNCE against a batch and a queue on the CPU; the kernel is in sweep.h.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/contrast_host.h"

namespace svitt {
namespace {

constexpr int64_t kItems = 64;         // enough for the threads of a large machine
constexpr int64_t kTilesPerSplit = 8;  // with 4, sums of 256 queries cost a quarter of all time

/// Ids as small numbers, equal where the ids are; what no query has is one number.
struct QueueIds {
  std::vector<int64_t> known;

  explicit QueueIds(const Tensor& query_ids)
      : known(query_ids.const_data_ptr<int64_t>(),
              query_ids.const_data_ptr<int64_t>() + query_ids.size(0)) {
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
  }
  std::vector<int32_t> number(const Tensor& ids) const {
    const int64_t* from = ids.const_data_ptr<int64_t>();
    std::vector<int32_t> to(ids.size(0));
    parallel_for(0, ids.size(0), 4096, [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b; ++i) {
        const auto at = std::lower_bound(known.begin(), known.end(), from[i]);
        to[i] = at != known.end() && *at == from[i] ? static_cast<int32_t>(at - known.begin())
                                                    : static_cast<int32_t>(known.size());
      }
    });
    return to;
  }
};

/// Embeddings as fp32 rows: in place, or in a copy.
struct Rows {
  std::unique_ptr<Buffer> copy;
  std::optional<TiledRows> tiled;
  float* data;
  int64_t step;

  Rows(const ContrastKernels& k, const ContrastQueue& problem, const Tensor& x) {
    Contrast p = problem;
    p.query = x.const_data_ptr(), p.query_step = x.stride(0);
    data = static_cast<float*>(const_cast<void*>(p.query)), step = p.query_step;
    if (p.dtype == Dtype::f32) return;
    copy = std::make_unique<Buffer>(p.queries * p.dim);
    p.rows = data = copy->get(), p.row_step = step = p.dim;
    parallel_for(0, p.queries, kGrain,
                 [&](int64_t a, int64_t b) { k.pack_queries(p, nullptr, a, b); });
    if (k.pack_tiles != nullptr)
      tiled.emplace(k, p.query, p.query_step, p.queries, p.dim, TiledRows::kPlain);
  }
  TileOperands operands() const { return tiled.has_value() ? tiled->operands() : TileOperands{}; }
};

std::tuple<Tensor, Tensor, Tensor> forward_op(Tensor query, Tensor key, Tensor queue,
                                              Tensor temperature, OptionalTensor teacher_query,
                                              double alpha, OptionalTensor query_ids,
                                              OptionalTensor key_ids, OptionalTensor queue_ids,
                                              bool gradients) {
  ContrastQueue p{};
  p.dtype = dtype("queue_info_nce", query);
  const ContrastKernels k = loss_kernels(p.dtype);
  p.queries = query.size(0), p.keys = key.size(0), p.dim = static_cast<int>(query.size(1));
  p.key = key.const_data_ptr(), p.key_step = key.stride(0);
  p.queue = queue.const_data_ptr(), p.queue_rows = queue.size(0), p.queue_step = queue.stride(0);
  set_temperature(p, temperature);
  p.alpha = alpha, p.gradients = gradients;
  std::vector<int32_t> of_queries, of_keys, of_queue;
  if (query_ids.has_value()) {
    const QueueIds ids(*query_ids);
    of_queries = ids.number(*query_ids), of_keys = ids.number(*key_ids);
    p.query_ids = of_queries.data(), p.key_ids = of_keys.data();
    if (queue_ids.has_value()) of_queue = ids.number(*queue_ids), p.queue_ids = of_queue.data();
  }
  const Rows rows(k, p, query);
  p.rows = rows.data, p.row_step = rows.step, p.tiled_queries = rows.operands();
  std::optional<Rows> teacher;
  if (teacher_query.has_value()) {
    teacher.emplace(k, p, *teacher_query);
    p.teacher = teacher->data, p.teacher_step = teacher->step;
    p.tiled_teacher = teacher->operands();
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
  parallel_for(0, p.queries, kGrain, [&](int64_t a, int64_t b) { k.queue_centres(p, a, b); });
  parallel_for(0, chunks * p.splits, 1, [&](int64_t a, int64_t b) { k.queue(p, a, b); });
  parallel_for(0, p.queries, 4, [&](int64_t a, int64_t b) { k.queue_finish(p, a, b); });
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

STABLE_TORCH_LIBRARY_IMPL(svitt_ops, CPU, m) {
  m.impl("queue_info_nce", TORCH_BOX(&svitt::forward_op));
}
