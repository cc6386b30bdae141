// InfoNCE on the CPU: registration, allocation, reductions and the choice of instruction set.
//
// Shapes and dtypes were checked in Python. Queries go in chunks; within one, each thread owns
// tiles of keys, so that what belongs to a key is summed over the queries in their order, and what
// belongs to a query is put together from the tiles in theirs. Chunks and tiles depend on the
// shapes alone, so results are the same for any number of threads.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../../library.h"
#include "../common/contrast_host.h"
#include "../common/dispatch.h"
#include "problem.h"

namespace svitt {
namespace {

constexpr double kNothing = -HUGE_VAL;

/// Adds a part's sums of exponentials: most + log(sum).
struct LogSum {
  double most = kNothing, sum = 0.0;

  void add(double other, double part) {
    if (part == 0.0) return;
    if (other > most) {
      sum = sum * std::exp(most - other) + part;
      most = other;
    } else {
      sum += part * std::exp(other - most);
    }
  }
  double value() const { return sum == 0.0 ? kNothing : most + std::log(sum); }
};

/// Statistics of row or column i, see `svitt_ops.info_nce`, from its parts `step` apart.
void write_statistics(double* stats, int64_t stride, int64_t i, const Tally* parts, int64_t count,
                      int64_t step) {
  LogSum negative, positive;
  double positives = 0.0, same = 0.0, every = 0.0, weight = 0.0;
  for (int64_t n = 0; n < count; ++n) {
    const Tally& part = parts[n * step];
    negative.add(part.most, part.sum);
    positive.add(part.positive_most, part.positive_sum);
    positives += part.count, same += part.same, every += part.every, weight += part.weight;
  }
  const double values[] = {negative.value(), positive.value(), positives, same, every, weight};
  for (int n = 0; n < 6; ++n) stats[n * stride + i] = values[n];
}

/// Mean loss of rows or columns; the formula is `svitt_ops.info_nce.losses`.
double mean_loss(const double* stats, int64_t count, double scale, int64_t choices,
                 double label_smoothing) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double negative = stats[i], positive = stats[count + i], positives = stats[2 * count + i],
                 mean = stats[3 * count + i] / stats[5 * count + i], every = stats[4 * count + i];
    const double gap = negative - positive;
    sum += gap > 0.0 ? gap + std::log1p(std::exp(-gap)) : std::log1p(std::exp(gap));
    if (positives != 1.0) sum += positive - scale * mean;
    if (label_smoothing != 0.0)
      sum += label_smoothing * scale * (mean - every / static_cast<double>(choices));
  }
  return sum / static_cast<double>(count);
}

void set_weights(Contrast& p, const OptionalTensor& of_queries, const OptionalTensor& of_keys) {
  if (of_queries.has_value()) p.query_weights = of_queries->const_data_ptr<float>();
  if (of_keys.has_value()) p.key_weights = of_keys->const_data_ptr<float>();
}

std::tuple<Tensor, Tensor, Tensor> forward_op(Tensor query, Tensor key, Tensor temperature,
                                              OptionalTensor query_ids, OptionalTensor key_ids,
                                              OptionalTensor query_weights,
                                              OptionalTensor key_weights, int64_t first_row,
                                              bool symmetric, double label_smoothing) {
  ContrastProblem<ContrastForward> problem("info_nce", query, key, query_ids, key_ids, first_row);
  ContrastForward& p = problem.p;
  set_temperature(p, temperature);
  set_weights(p, query_weights, key_weights);
  const InfoNceKernels& k = choose<InfoNceKernels>(p);
  p.symmetric = symmetric, p.smooth = label_smoothing != 0.0;
  problem.pack(k, false);
  Tensor loss = empty(query, {}, ScalarType::Float),
         rows = empty(query, {6, p.queries}, ScalarType::Double),
         columns = empty(query, {6, symmetric ? p.keys : 0}, ScalarType::Double);
  double *of_rows = rows.mutable_data_ptr<double>(),
         *of_columns = symmetric ? columns.mutable_data_ptr<double>() : nullptr;
  std::vector<Tally> parts(p.tiles() * p.chunk_rows()), of_keys(symmetric ? p.keys : 0);
  p.row_parts = parts.data(), p.of_keys = of_keys.data();
  for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) {
    const int64_t first = chunk * kQueryChunk,
                  count = std::min(p.queries - first, kQueryChunk + 0L);
    parallel_for(0, p.tiles(), 1, [&](int64_t a, int64_t b) { k.forward(p, chunk, a, b); });
    parallel_for(0, count, kGrain, [&](int64_t a, int64_t b) {
      for (int64_t r = a; r < b; ++r)
        write_statistics(of_rows, p.queries, first + r, p.row_parts + r, p.tiles(), p.chunk_rows());
    });
  }
  // One similarity that is none leaves nothing of the batch, here and in the backward, nor does a
  // row whose positives weigh nothing.
  const double* weights = of_rows + 5 * p.queries;
  if (std::any_of(of_rows, of_rows + p.queries, [](double x) { return x != x; }) ||
      (p.key_weights != nullptr &&
       !std::all_of(weights, weights + p.queries, [](double x) { return x > 0.0; }))) {
    for (Tensor* x : {&loss, &rows, &columns}) torch::stable::fill_(*x, NAN);
    return {loss, rows, columns};
  }
  double mean = mean_loss(of_rows, p.queries, p.scale, p.keys, label_smoothing);
  if (symmetric) {
    for (int64_t j = 0; j < p.keys; ++j)
      write_statistics(of_columns, p.keys, j, p.of_keys + j, 1, 0);
    mean = (mean + mean_loss(of_columns, p.keys, p.scale, p.keys, label_smoothing)) / 2;
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(mean);
  return {loss, rows, columns};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(Tensor grad_loss, Tensor query, Tensor key,
                                               Tensor temperature, OptionalTensor query_ids,
                                               OptionalTensor key_ids, OptionalTensor query_weights,
                                               OptionalTensor key_weights, int64_t first_row,
                                               Tensor rows, Tensor columns, double label_smoothing,
                                               bool wide) {
  ContrastProblem<ContrastBackward> problem("info_nce", query, key, query_ids, key_ids, first_row);
  ContrastBackward& p = problem.p;
  set_temperature(p, temperature);
  set_weights(p, query_weights, key_weights);
  const InfoNceKernels& k = choose<InfoNceKernels>(p);
  problem.pack(k, true);
  p.symmetric = columns.numel() > 0;
  p.of_rows = rows.const_data_ptr<double>();
  p.of_columns = p.symmetric ? columns.const_data_ptr<double>() : nullptr;
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.smoothing = static_cast<float>(label_smoothing / static_cast<double>(p.keys));
  const double mean =
      *grad_loss.const_data_ptr<float>() / static_cast<double>(p.keys) / (p.symmetric ? 2.0 : 1.0);
  const double scale = 1.0 / *temperature.const_data_ptr<float>();
  p.factor = static_cast<float>(mean * scale);
  // The mean over all positives of whichever statistics every strip of a batch shares.
  const double* stats = p.symmetric ? p.of_columns : p.of_rows;
  const int64_t count = p.symmetric ? p.keys : p.queries;
  double same = 0.0, weight = 0.0;
  for (int64_t i = 0; i < count; ++i) weight += stats[5 * count + i], same += stats[3 * count + i];
  p.centre = static_cast<float>(same / weight);
  const ScalarType type = wide ? ScalarType::Float : query.scalar_type();
  Tensor grad_query = empty(query, {p.queries, p.dim}, type),
         grad_key = empty(query, {p.keys, p.dim}, type),
         grad_temperature = empty(query, {}, ScalarType::Float);
  if (p.centre != p.centre) {
    for (Tensor* x : {&grad_query, &grad_key, &grad_temperature}) torch::stable::fill_(*x, NAN);
    return {grad_query, grad_key, grad_temperature};
  }
  problem.want_gradients(k, grad_query, grad_key);
  std::vector<double> grad_scale(p.tiles());
  p.grad_scale = grad_scale.data();
  problem.sweep(k, k.backward);
  double sum = 0.0;
  for (const double part : grad_scale) sum += part;
  // By the scale s = 1 / temperature, and from it to the temperature: -s s.
  *grad_temperature.mutable_data_ptr<float>() = static_cast<float>(-sum * mean * scale * scale);
  return {grad_query, grad_key, grad_temperature};
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&svitt::forward_op));
  m.impl("info_nce_backward", TORCH_BOX(&svitt::backward_op));
}
