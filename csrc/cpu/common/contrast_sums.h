// Sums of exponentials over the negatives of a query or a key.
#pragma once

#include "contrast.h"
#include "contrast_tiles.h"

SVITT_KERNELS_BEGIN

SVITT_INLINE float exp_float(float x) { return exp_nonpositive(splat(x))[0]; }

SVITT_INLINE void clear(Tally& t) { t = {-kInfinity, -kInfinity, 0, 0, 0, 0, 0, 0}; }

SVITT_INLINE float weight_at(const float* weights, int64_t i) {
  return weights == nullptr ? 1.0f : weights[i];
}

/// A sum of exp(x - most) joins the negatives.
SVITT_INLINE void add_negatives(Tally& t, float most, float sum) {
  if (most == -kInfinity) return;
  if (most > t.most) {
    t.sum = (t.most == -kInfinity ? 0.0f : t.sum * exp_float(t.most - most)) + sum;
    t.most = most;
  } else {
    t.sum += sum * exp_float(most - t.most);
  }
}

/// Offsets of their own for each row and each column.
SVITT_INLINE void sum_apart(const Contrast& p, const DotTile& t, Tally* of_rows,
                            Tally* of_columns) {
  const vf scale = splat(p.scale);
  for (int r = 0; r < t.rows; ++r) {
    const float* x = t.dots + r * kDotStride;
    vf high = splat(-kInfinity), sum{};
    for (int c = 0; c < t.keys; c += W) high = vmax(high, load(x + c));
    const float most = hmax(high) * p.scale;
    if (most == -kInfinity) continue;
    for (int c = 0; c < t.keys; c += W)
      sum += exp_nonpositive(multiply_add(load(x + c), scale, splat(-most)));
    add_negatives(of_rows[r], most, hsum(sum));
  }
  if (of_columns == nullptr) return;
  for (int c = 0; c < t.keys; c += W) {
    vf high = splat(-kInfinity), sum{};
    for (int r = 0; r < t.rows; ++r) high = vmax(high, load(t.dots + r * kDotStride + c));
    high = high * scale;
    const vf offset = high == -kInfinity ? vf{} : high;
    for (int r = 0; r < t.rows; ++r)
      sum += exp_nonpositive(multiply_add(load(t.dots + r * kDotStride + c), scale, -offset));
    for (int i = 0; i < W && c + i < t.keys; ++i) add_negatives(of_columns[c + i], high[i], sum[i]);
  }
}

/// log(exp(a) + exp(b)) of a row's or a column's negatives and positives.
SVITT_INLINE double log_sum(double a, double b) {
  const double most = a > b ? a : b, least = a > b ? b : a;
  return most + __builtin_log1p(__builtin_exp(least - most));
}

SVITT_KERNELS_END
