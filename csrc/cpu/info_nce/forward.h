// Forward: a thread owns a tile of keys and all their columns; rows are parts, one per tile.
#pragma once

#include "../common/arena.h"
#include "../common/contrast_sums.h"
#include "../common/contrast_tiles.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

SVITT_INLINE void add_positive(Tally& t, float dot, float scale, float weight) {
  const double x = static_cast<double>(dot) * scale;
  if (x > t.positive_most) {
    const float before = static_cast<float>(t.positive_most - x);
    t.positive_sum = t.count == 0 ? 1.0f : t.positive_sum * exp_float(before) + 1.0f;
    t.positive_most = x;
  } else {
    t.positive_sum += exp_float(static_cast<float>(x - t.positive_most));
  }
  t.same += weight * dot, t.weight += weight;
  ++t.count;
}

/// One exponential for rows and columns.
SVITT_INLINE void sum_shared(const Contrast& p, const DotTile& t, Tally* of_rows,
                             Tally* of_columns) {
  const float offset = t.most * p.scale;
  const vf low = splat(-offset), scale = splat(p.scale);
  alignas(64) float sums[kKeyTile] = {};
  for (int r = 0; r < t.rows; ++r) {
    const float* x = t.dots + r * kDotStride;
    vf sum{};
    for (int c = 0; c < t.keys; c += W) {
      const vf e = exp_nonpositive(multiply_add(load(x + c), scale, low));
      sum += e;
      store(sums + c, load(sums + c) + e);
    }
    add_negatives(of_rows[r], offset, hsum(sum));
  }
  if (of_columns == nullptr) return;
  for (int c = 0; c < t.keys; ++c) add_negatives(of_columns[c], offset, sums[c]);
}

/// Everything that a tile of similarities says about its rows and its keys.
SVITT_INLINE void add_tile(const ContrastForward& p, DotTile& t, Tally* of_rows, Tally* of_keys) {
  for (int r = 0; r < t.rows; ++r) {
    clear(of_rows[r]);
    // A maximum of its own, so that the NaN is not taken for the sum of nothing.
    if (t.unusable(r, p.limit)) of_rows[r].most = 0.0f, of_rows[r].sum = __builtin_nanf("");
  }
  if (p.smooth)
    for (int r = 0; r < t.rows; ++r)
      for (int c = 0; c < t.keys; ++c) {
        of_rows[r].every += t.dots[r * kDotStride + c];
        if (of_keys != nullptr) of_keys[c].every += t.dots[r * kDotStride + c];
      }
  t.for_positives(p, [&](int r, int c, float dot) {
    add_positive(of_rows[r], dot, p.scale, weight_at(p.key_weights, t.first_key + c));
    if (of_keys != nullptr)
      add_positive(of_keys[c], dot, p.scale, weight_at(p.query_weights, t.row + r));
  });
  t.keep_negatives(p);
  t.find_range();
  if (t.most == -kInfinity) return;
  if (t.shared(p.scale)) {
    sum_shared(p, t, of_rows, of_keys);
  } else {
    sum_apart(p, t, of_rows, of_keys);
  }
}

/// The tallies of a tile's keys, empty before the first chunk; null in one direction.
SVITT_INLINE Tally* key_tallies(const ContrastForward& p, int64_t chunk, int64_t tile) {
  if (!p.symmetric) return nullptr;
  Tally* of_keys = p.of_keys + tile * kKeyTile;
  const int64_t left = p.keys - tile * kKeyTile;
  for (int c = 0; chunk == 0 && c < kKeyTile && c < left; ++c) clear(of_keys[c]);
  return of_keys;
}

/// Tiles [begin, end) of a chunk, `kStep` queries at a time; `compute` makes their similarities.
template <int kStep, class Compute>
SVITT_INLINE void forward_tiles(const ContrastForward& p, int64_t chunk, int64_t begin, int64_t end,
                                const Compute& compute) {
  const FlushDenormals flush;
  Arena arena;
  float* dots = arena.take<float>(kStep * kDotStride);
  for (int64_t tile = begin; tile < end; ++tile) {
    Tally* of_keys = key_tallies(p, chunk, tile);
    Tally* of_rows = p.row_parts + tile * p.chunk_rows();
    const int64_t start = chunk * kQueryChunk;
    for (int64_t row = start; row < chunk_end(p, chunk); row += kStep) {
      DotTile t = dot_tile(p, chunk, row, tile, dots, kStep);
      compute(t);
      add_tile(p, t, of_rows + (row - start), of_keys);
    }
  }
}

inline void contrast_forward(const ContrastForward& p, int64_t chunk, int64_t begin, int64_t end) {
  forward_tiles<kDotRows>(p, chunk, begin, end, [&](DotTile& t) { t.compute(p); });
}

SVITT_KERNELS_END
