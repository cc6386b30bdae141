// What a pair costs, and what it weighs in the gradient: its own sigmoid.
//
// Of e = exp(-|logit|), loss and weight both follow, and neither subtracts what is nearly equal.
#pragma once

#include "../common/arena.h"
#include "../common/contrast_gradient.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

struct SigmoidWeights {
  const ContrastSigmoid& p;
  int64_t chunk;
  PairSums sums{};

  SigmoidWeights(const ContrastSigmoid& problem, int64_t of_chunk, Arena&, int)
      : p(problem), chunk(of_chunk) {}
  void begin(const DotTile& t) { sums = chunk == 0 ? PairSums{} : p.sums[t.tile]; }
  void end(const DotTile& t) { p.sums[t.tile] = sums; }

  /// Weights into `to` (rows, kGradStride), which may be null, or the similarities themselves.
  SVITT_INLINE void weigh(const DotTile& t, int, float* to) {
    const vf scale = splat(p.scale), bias = splat(p.bias);
    for (int r = 0; r < t.rows; ++r) {
      // A similarity that is no logit leaves nothing of the batch: its tile tells the others.
      if (t.unusable(r, p.limit)) sums.weight = sums.loss = sums.moment = __builtin_nan("");
      const float* x = t.dots + r * kDotStride;
      vf loss{}, moment{}, weights{};
      for (int c = 0; c < t.keys; c += W) {
        const vf dot = load(x + c), logit = multiply_add(dot, scale, bias);
        const vi same = t.positives(p, r, c), exists = lane_numbers() < t.keys - c;
        const vf wrong = same ? -logit : logit;  // how far the pair is on the wrong side
        const vf e = exp_nonpositive(vmax(-wrong, wrong) * -1.0f), share = 1.0f / (1.0f + e);
        const vf size = wrong >= 0.0f ? share : e * share;
        const vf weight = exists ? (same ? -size : size) : vf{};
        loss += exists ? vmax(vf{}, wrong) + log1p_unit(e) : vf{};
        moment += weight * dot;
        weights += weight;
        if (to != nullptr) store(to + r * kGradStride + c, weight);
      }
      sums.loss += hsum(loss), sums.moment += hsum(moment), sums.weight += hsum(weights);
    }
  }
};

inline void contrast_sigmoid(const ContrastSigmoid& p, int64_t chunk, int64_t begin, int64_t end) {
  weigh_tiles<GradientProducts, SigmoidWeights>(p, chunk, begin, end);
}

SVITT_KERNELS_END
