// Backward: similarities again, what they weigh in the gradient, and two products with that.
#pragma once

#include "../common/arena.h"
#include "../common/contrast_sums.h"
#include "../common/contrast_tiles.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

constexpr int kSummedTiles = 4;  // tiles of keys whose weights stay in the L2 cache together

/// Softmax less target of one positive, from the share of the negatives: nothing cancels once
/// pairs converge. `stats` is a (5, stride) matrix.
SVITT_INLINE float positive_weight(const double* stats, int64_t stride, int64_t i, double logit,
                                   float label_smoothing) {
  const double negative = stats[i], positive = stats[stride + i], count = stats[2 * stride + i];
  const double total = log_sum(negative, positive);
  const double among = count == 1.0 ? 1.0 : __builtin_exp(logit - positive);
  return static_cast<float>(__builtin_exp(positive - total) * (among - 1.0 / count) -
                            __builtin_exp(negative - total) / count + label_smoothing / count);
}

struct GradScratch {
  Arena arena;
  float *dots, *kept, *row_high, *row_low, *key_high, *key_low, *key_weight;

  explicit GradScratch(int rows) {
    arena.take_all(rows * kDotStride, dots, kept);
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
    float weight = positive_weight(p.of_rows, p.queries, t.row + r, logit, p.label_smoothing);
    if (both)
      weight += positive_weight(p.of_columns, p.keys, t.first_key + c, logit, p.label_smoothing);
    weight -= smooth[0];
    grads[r * kGradStride + c] = weight;
    grad_scale += static_cast<double>(weight) * (dot - p.centre);
  });
  return grad_scale;
}

/// Weights of a tile of keys with a chunk of queries, and the keys' gradient from them.
inline void contrast_backward_keys(const ContrastBackward& p, int64_t chunk, int64_t begin,
                                   int64_t end) {
  const FlushDenormals flush;
  GradScratch s(kDotRows);
  const int64_t start = chunk * kQueryChunk, limit = chunk_end(p, chunk);
  const int queries = static_cast<int>(limit - start), step = p.padded_dim();
  s.load_totals(p.of_rows, p.queries, start, queries, s.row_high, s.row_low);
  for (int64_t tile = begin; tile < end; ++tile) {
    float* grads = p.grads + tile * p.chunk_rows() * kGradStride;
    double grad_scale = chunk == 0 ? 0.0 : p.grad_scale[tile];
    DotTile t = dot_tile(p, chunk, start, tile, s.dots);
    if (p.of_columns != nullptr)
      s.load_totals(p.of_columns, p.keys, t.first_key, t.keys, s.key_high, s.key_low);
    for (int64_t row = start; row < limit; row += kDotRows) {
      t = dot_tile(p, chunk, row, tile, s.dots);
      const int first = static_cast<int>(row - start);
      t.compute(p);
      grad_scale += weigh(p, t, first, s, grads + first * kGradStride);
    }
    p.grad_scale[tile] = grad_scale;
    float* rows[kKeyTile];
    for (int panel = 0; panel * kPanel < p.dim; ++panel) {
      for (int j = 0; j < t.keys; ++j)
        rows[j] = p.grad_keys + (t.first_key + j) * step + panel * kPanel;
      const float* b = p.query_panels + (panel * p.queries + start) * kPanel;
      multiply_pieces(t.keys, grads, {1, kGradStride}, b, queries, rows, chunk > 0);
    }
  }
}

inline void write_rows(const ContrastBackward& p, const float* from, void* to, int64_t row,
                       int64_t rows) {
  with_type(p.grad_dtype, [&](auto x) {
    auto* first = static_cast<decltype(x)*>(to) + row * p.dim;
    for (int64_t r = 0; r < rows; ++r)
      write_row(first + r * p.dim, from + r * p.padded_dim(), p.dim, p.factor);
  });
}

/// The gradient of queries [begin, end) of a chunk, from the weights of all tiles.
inline void contrast_backward_queries(const ContrastBackward& p, int64_t chunk, int64_t begin,
                                      int64_t end) {
  const int count = static_cast<int>(end - begin), step = p.padded_dim();
  float* rows[kQueryChunk];
  for (int64_t first = 0; first < p.tiles(); first += kSummedTiles)
    for (int panel = 0; panel * kPanel < p.dim; ++panel) {
      for (int r = 0; r < count; ++r)
        rows[r] = p.grad_queries + (begin + r) * step + panel * kPanel;
      for (int64_t tile = first; tile < p.tiles() && tile < first + kSummedTiles; ++tile) {
        const int64_t left = p.keys - tile * kKeyTile;
        multiply_pieces(count, p.grads + (tile * p.chunk_rows() + begin) * kGradStride,
                        {kGradStride, 1},
                        p.key_panels + (panel * p.padded_keys() + tile * kKeyTile) * kPanel,
                        static_cast<int>(left < kKeyTile ? left : kKeyTile), rows, tile > 0);
      }
    }
  write_rows(p, p.grad_queries + begin * step, p.grad_query, chunk * kQueryChunk + begin, count);
}

inline void contrast_write_keys(const ContrastBackward& p, int64_t begin, int64_t end) {
  write_rows(p, p.grad_keys + begin * p.padded_dim(), p.grad_key, begin, end - begin);
}

SVITT_KERNELS_END
