// A sampled negative for each query.
//
// There are two looks at each row: the sums of all tiles, then the tile that the draw falls in.
#pragma once

#include "../common/arena.h"
#include "../common/contrast_sums.h"
#include "../common/contrast_tiles.h"

SVITT_KERNELS_BEGIN

/// Makes what cannot be drawn -inf: positives, and similarities that are no logits.
SVITT_INLINE void keep_choices(const Contrast& p, DotTile& t) {
  t.keep_negatives(p);
  for (int r = 0; r < t.rows; ++r)
    for (int c = 0; c < t.keys; c += W) {
      float* x = t.dots + r * kDotStride + c;
      store(x, DotTile::beyond(load(x), p.limit) ? splat(-kInfinity) : load(x));
    }
}

/// The key of one tile at which the weights exp(x - most), added up, pass `target`; or the last
/// that weighs anything, where rounding leaves none.
SVITT_INLINE int64_t pass(const ContrastSearch& p, const DotTile& t, double most, double target) {
  const vf scale = splat(p.scale), offset = splat(-static_cast<float>(most));
  double sum = 0.0;
  int64_t last = -1;
  for (int c = 0; c < t.keys; c += W) {
    const vf x = load(t.dots + c);
    const vf weight = exp_nonpositive(multiply_add(x, scale, offset));
    for (int i = 0; i < W && c + i < t.keys; ++i) {
      if (x[i] == -kInfinity || weight[i] == 0.0f) continue;
      sum += weight[i];
      last = t.first_key + c + i;
      if (sum > target) return last;
    }
  }
  return last;
}

constexpr int64_t kKeptChoices = 16;  // tiles, a megabyte; of others some rows are computed twice

/// Queries [begin, end), `kStep` at a time; `compute` makes the similarities of a tile, `kAgain`
/// rows or all.
template <int kStep, int kAgain, class Compute>
SVITT_INLINE void sample_queries(const ContrastSearch& p, int64_t begin, int64_t end,
                                 const Compute& compute) {
  constexpr int64_t kSize = kStep * kDotStride;
  Arena arena;
  float *kept = arena.take<float>(kKeptChoices * kSize), *dots = arena.take<float>(kSize);
  Tally* parts = arena.take<Tally>(p.tiles() * kStep);
  for (int64_t row = begin; row < end; row += kStep) {
    const int64_t rows = end - row < kStep ? end - row : kStep;
    for (int64_t tile = 0; tile < p.tiles(); ++tile) {
      DotTile t = place_tile(p, row, rows, tile, tile < kKeptChoices ? kept + tile * kSize : dots);
      compute(t);
      Tally* of_rows = parts + tile * kStep;
      for (int64_t r = 0; r < rows; ++r) clear(of_rows[r]);
      keep_choices(p, t);
      sum_apart(p, t, of_rows, nullptr);
    }
    for (int64_t r = 0; r < rows; ++r) {
      double most = -kInfinity, sum = 0.0;
      for (int64_t tile = 0; tile < p.tiles(); ++tile)
        if (parts[tile * kStep + r].most > most) most = parts[tile * kStep + r].most;
      const auto weight = [&](int64_t tile) {
        const Tally& part = parts[tile * kStep + r];
        return part.sum == 0.0f ? 0.0 : part.sum * __builtin_exp(part.most - most);
      };
      for (int64_t tile = 0; tile < p.tiles(); ++tile) sum += weight(tile);
      // The tile in which the share is reached; rounding may leave none, then the last that weighs.
      int64_t chosen = -1;
      double left = p.uniform[row + r] * sum;
      for (int64_t tile = 0; tile < p.tiles(); ++tile) {
        const double here = weight(tile);
        if (here == 0.0) continue;
        chosen = tile;
        if (left < here) break;
        left -= here;
      }
      p.found[row + r] = -1;
      if (chosen < 0) continue;
      float* own = kept + chosen * kSize + r * kDotStride;
      if (chosen >= kKeptChoices) {
        const int64_t first = r / kAgain * kAgain, left = rows - first;
        DotTile some = place_tile(p, row + first, left < kAgain ? left : kAgain, chosen, dots);
        compute(some);
        own = dots + (r - first) * kDotStride;
      }
      DotTile t = place_tile(p, row + r, 1, chosen, own);
      keep_choices(p, t);
      p.found[row + r] = pass(p, t, most, left);
    }
  }
}

inline void contrast_sample(const ContrastSearch& p, int64_t begin, int64_t end) {
  sample_queries<kDotRows, 1>(p, begin, end, [&](DotTile& t) { t.compute(p); });
}

SVITT_KERNELS_END
