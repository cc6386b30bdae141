// What is left of the loss against a queue once the negatives are summed: positives, which are few,
// and everything put together.
#pragma once

#include "../common/arena.h"
#include "../common/contrast_sums.h"
#include "../common/contrast_tiles.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

template <class T>
SVITT_INLINE float dot_rows(const float* a, const T* b, int dim) {
  vf sum{};
  for (int d = 0; d < dim; d += W) sum += load_some(a + d, dim - d) * load_some(b + d, dim - d);
  return hsum(sum);
}

template <class T>
void queue_centres(const ContrastQueue& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* own = row_of<T>(p.key, p.key_step, row);
    p.centres[row] = dot_rows(p.rows + row * p.row_step, own, p.dim);
    if (p.teacher != nullptr)
      p.teacher_centres[row] = dot_rows(p.teacher + row * p.teacher_step, own, p.dim);
  }
}

inline void contrast_queue_centres(const ContrastQueue& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { queue_centres<decltype(x)>(p, begin, end); });
}

/// A positive of one query: logits and similarity less those of the own pair.
struct Positive {
  const void* row;
  double logit, taught, similarity;
};

/// One distribution of a query: the parts of its negatives together, and its positives.
struct Distribution {
  double most = -kInfinity, sum = 0.0, mean = 0.0;  // of the negatives; mean similarity
  double positive = -kInfinity;                     // log-sum-exp of the positives
  double total, lost;                               // log-sum-exp of all, share of the negatives
  double expected;                                  // similarity

  Distribution(const QueueTally* parts, SoftSum QueueTally::* which, int64_t splits, int64_t step,
               const Positive* positives, double Positive::* logit, int64_t count) {
    for (int64_t n = 0; n < splits; ++n) most = vmax(most, (parts[n * step].*which).most);
    for (int64_t n = 0; n < splits; ++n) {
      const SoftSum& part = parts[n * step].*which;
      const double weight = part.sum == 0.0f ? 0.0 : __builtin_exp(part.most - most);
      sum += weight * part.sum, mean += weight * part.moment;
    }
    if (sum > 0.0) mean /= sum;
    double high = -kInfinity, weights = 0.0, moment = 0.0;
    for (int64_t i = 0; i < count; ++i) high = vmax(high, positives[i].*logit);
    for (int64_t i = 0; i < count; ++i) {
      const double weight = __builtin_exp(positives[i].*logit - high);
      weights += weight, moment += weight * positives[i].similarity;
    }
    if (count > 0) positive = high + __builtin_log(weights);
    const double negative = sum == 0.0 ? -kInfinity : most + __builtin_log(sum);
    total = log_sum(negative, positive);
    lost = __builtin_exp(negative - total);
    expected = lost * mean + (count > 0 ? __builtin_exp(positive - total) * moment / weights : 0.0);
  }
  /// What the weighted candidates of a part count for.
  float share(const SoftSum& part) const {
    return part.sum == 0.0f ? 0.0f
                            : static_cast<float>(__builtin_exp(part.most - most) * lost / sum);
  }

 private:
  static double vmax(double a, double b) { return a > b ? a : b; }
};

/// The positives of a query, in order; returns how many.
template <class T>
int64_t find_positives(const ContrastQueue& p, int64_t row, Positive* found) {
  int64_t count = 0;
  const auto add = [&](const T* candidate, bool own) {
    Positive& one = found[count++];
    one = {candidate, 0.0, 0.0, 0.0};
    if (own) return;
    one.similarity =
        static_cast<double>(dot_rows(p.rows + row * p.row_step, candidate, p.dim)) - p.centres[row];
    one.logit = one.similarity * p.scale;
    if (p.teacher == nullptr) return;
    const float dot = dot_rows(p.teacher + row * p.teacher_step, candidate, p.dim);
    one.taught = (static_cast<double>(dot) - p.teacher_centres[row]) * p.scale;
  };
  if (p.query_ids == nullptr) {
    add(row_of<T>(p.key, p.key_step, row), true);
    return count;
  }
  const int32_t id = p.query_ids[row];
  for (int64_t j = 0; j < p.keys; ++j)
    if (p.key_ids[j] == id) add(row_of<T>(p.key, p.key_step, j), j == row);
  for (int64_t j = 0; p.queue_ids != nullptr && j < p.queue_rows; ++j)
    if (p.queue_ids[j] == id) add(row_of<T>(p.queue, p.queue_step, j), false);
  return count;
}

/// Loss of some queries, the sum of weight times similarity, and the gradient.
template <class T>
void queue_finish(const ContrastQueue& p, int64_t begin, int64_t end) {
  Arena arena;
  Positive* positives = arena.take<Positive>(p.keys + p.queue_rows);
  const int64_t step = p.padded_dim(), size = p.padded_queries() * step;
  const bool taught = p.teacher != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t count = find_positives<T>(p, row, positives);
    const QueueTally* parts = p.tallies + row;
    const Distribution student(parts, &QueueTally::student, p.splits, p.queries, positives,
                               &Positive::logit, count);
    const Distribution teacher = taught
                                     ? Distribution(parts, &QueueTally::teacher, p.splits,
                                                    p.queries, positives, &Positive::taught, count)
                                     : student;
    const double alpha = p.alpha, hard = count > 0 ? 1.0 - alpha : 0.0, all = hard + alpha;
    double same = 0.0;
    for (int64_t i = 0; i < count; ++i) same += positives[i].similarity;
    if (count > 0) same /= static_cast<double>(count);
    p.losses[row] = all * student.total - p.scale * (hard * same + alpha * teacher.expected);
    if (!p.gradients) continue;

    double moment = all * student.lost * student.mean - alpha * teacher.lost * teacher.mean;
    float* grad = p.grad + row * p.dim;
    for (int d = 0; d < p.dim; ++d) grad[d] = 0.0f;
    for (int64_t n = 0; n < p.splits; ++n) {
      const QueueTally& part = parts[n * p.queries];
      const float* sums = p.sums + n * p.distributions() * size + row * step;
      const float weight = static_cast<float>(all) * student.share(part.student);
      for (int d = 0; d < p.dim; ++d) grad[d] += weight * sums[d];
      if (!taught) continue;
      const float other = static_cast<float>(alpha) * teacher.share(part.teacher);
      for (int d = 0; d < p.dim; ++d) grad[d] -= other * sums[size + d];
    }
    // A positive weighs softmax less target, from the negatives' shares: of a single one, what
    // would cancel is left out.
    for (int64_t i = 0; i < count; ++i) {
      const Positive& one = positives[i];
      double weight = alpha * teacher.lost - student.lost;
      if (count > 1) {
        const double among = __builtin_exp(one.logit - student.positive),
                     other = taught ? __builtin_exp(one.taught - teacher.positive) : 0.0;
        weight = among - alpha * other - hard / static_cast<double>(count) +
                 alpha * teacher.lost * other - student.lost * among;
      }
      moment += weight * one.similarity;
      const T* candidate = static_cast<const T*>(one.row);
      for (int d = 0; d < p.dim; ++d)
        grad[d] += static_cast<float>(weight) * to_float(candidate[d]);
    }
    p.moments[row] = moment;
    const float factor = p.scale / static_cast<float>(p.queries);
    for (int d = 0; d < p.dim; ++d) grad[d] *= factor;
  }
}

inline void contrast_queue_finish(const ContrastQueue& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { queue_finish<decltype(x)>(p, begin, end); });
}

SVITT_KERNELS_END
