// Backward: what the similarities, which are computed again, weigh in the gradient.
#pragma once

#include "../common/arena.h"
#include "../common/contrast_gradient.h"
#include "../common/contrast_sums.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

/// Softmax less target of one positive, from the share of the negatives: nothing cancels once
/// pairs converge. `stats` is a (6, stride) matrix.
SVITT_INLINE float positive_weight(const double* stats, int64_t stride, int64_t i, double logit,
                                   double weight, float label_smoothing) {
  const double negative = stats[i], positive = stats[stride + i], count = stats[2 * stride + i],
               weights = stats[5 * stride + i];
  const double total = log_sum(negative, positive);
  const double among = count == 1.0 ? 1.0 : __builtin_exp(logit - positive);
  return static_cast<float>(__builtin_exp(positive - total) * (among - weight / weights) -
                            __builtin_exp(negative - total) * weight / weights +
                            label_smoothing * weight / weights);
}

struct GradScratch {
  float *kept, *row_high, *row_low, *key_high, *key_low, *key_weight;

  GradScratch(Arena& arena, int rows) {
    kept = arena.take<float>(rows * kDotStride);
    arena.take_all(kQueryChunk, row_high, row_low);
    arena.take_all(kKeyTile, key_high, key_low, key_weight);
  }

  /// The log-sum-exp of rows or columns, as two floats each: one is not enough where it is large.
  static void load_totals(const double* stats, int64_t stride, int64_t first, int count,
                          float* high, float* low) {
    for (int i = 0; i < count; ++i) {
      const double total = log_sum(stats[first + i], stats[stride + first + i]);
      high[i] = static_cast<float>(total);
      low[i] = static_cast<float>(total - high[i]);
    }
    for (int i = count; i % W != 0; ++i) high[i] = low[i] = 0.0f;
  }
};

/// exp(offset - total). Beyond kShared there is nothing to weigh: the tile's row or column is
/// empty.
SVITT_INLINE vf weight_of(vf high, vf low, float offset) {
  return exp_nonpositive(-vmax(splat(-kShared - 1.0f), high - offset + low));
}

/// What each similarity weighs in the gradient, into `grads` (rows, kGradStride), which may be the
/// similarities themselves; returns the sum of weight times similarity. Weights add up to 0 over
/// everything, so similarities may be taken from any centre: near theirs, rounded weights do no
/// harm where all similarities are alike.
SVITT_INLINE double weigh(const ContrastBackward& p, DotTile& t, int first, GradScratch& s,
                          float* grads) {
  t.for_positives(p, [&](int r, int c, float dot) { s.kept[r * kDotStride + c] = dot; });
  t.keep_negatives(p);
  t.find_range();
  const bool both = p.of_columns != nullptr, shared = t.shared(p.scale);
  const float offset = shared && t.most > -kInfinity ? t.most * p.scale : 0.0f;
  const vf scale = splat(p.scale), smooth = splat(both ? 2 * p.smoothing : p.smoothing);
  if (shared && both)
    for (int c = 0; c < t.keys; c += W)
      store(s.key_weight + c, weight_of(load(s.key_high + c), load(s.key_low + c), offset));
  double grad_scale = 0.0;
  for (int r = 0; r < t.rows; ++r) {
    const float* x = t.dots + r * kDotStride;
    float* to = grads + r * kGradStride;
    const vf high = splat(s.row_high[first + r]), low = splat(s.row_low[first + r]);
    const vf of_row = weight_of(high, low, offset);
    vf sum{};
    for (int c = 0; c < t.keys; c += W) {
      const vf dot = load(x + c);
      vf weight;
      if (shared) {
        const vf e = exp_nonpositive(multiply_add(dot, scale, splat(-offset)));
        weight = e * (both ? of_row + load(s.key_weight + c) : of_row);
      } else {
        weight = exp_nonpositive(multiply_add(dot, scale, -high) - low);
        if (both)
          weight += exp_nonpositive(multiply_add(dot, scale, -load(s.key_high + c)) -
                                    load(s.key_low + c));
      }
      const vi none = dot == -kInfinity;
      weight = (none ? vf{} : weight) - smooth;
      store(to + c, weight);
      sum += none ? vf{} : weight * (dot - p.centre);
    }
    grad_scale += hsum(sum);
  }
  t.for_positives(p, [&](int r, int c, float) {
    const float dot = s.kept[r * kDotStride + c];
    const double logit = static_cast<double>(dot) * p.scale;
    const int64_t row = t.row + r, key = t.first_key + c;
    float weight = positive_weight(p.of_rows, p.queries, row, logit, weight_at(p.key_weights, key),
                                   p.label_smoothing);
    if (both)
      weight += positive_weight(p.of_columns, p.keys, key, logit, weight_at(p.query_weights, row),
                                p.label_smoothing);
    weight -= smooth[0];
    grads[r * kGradStride + c] = weight;
    grad_scale += static_cast<double>(weight) * (dot - p.centre);
  });
  return grad_scale;
}

/// Softmax less target, of a chunk's rows and a tile's columns.
struct SoftmaxWeights {
  const ContrastBackward& p;
  int64_t chunk;
  GradScratch s;
  double grad_scale = 0.0;

  SoftmaxWeights(const ContrastBackward& problem, int64_t of_chunk, Arena& arena, int rows)
      : p(problem), chunk(of_chunk), s(arena, rows) {
    const int64_t start = chunk * kQueryChunk;
    const int queries = static_cast<int>(chunk_end(p, chunk) - start);
    s.load_totals(p.of_rows, p.queries, start, queries, s.row_high, s.row_low);
  }
  void begin(const DotTile& t) {
    grad_scale = chunk == 0 ? 0.0 : p.grad_scale[t.tile];
    if (p.of_columns != nullptr)
      s.load_totals(p.of_columns, p.keys, t.first_key, t.keys, s.key_high, s.key_low);
  }
  void weigh(DotTile& t, int first, float* to) {
    grad_scale += svitt::SVITT_ISA::weigh(p, t, first, s, to);
  }
  void end(const DotTile& t) { p.grad_scale[t.tile] = grad_scale; }
};

inline void contrast_backward(const ContrastBackward& p, int64_t chunk, int64_t begin,
                              int64_t end) {
  weigh_tiles<GradientProducts, SoftmaxWeights>(p, chunk, begin, end);
}

SVITT_KERNELS_END
