// The rank of each query's best positive.
//
// There are two looks at each row: the best positive, then all keys. Tiles that hold positives are
// kept between the two; computing them twice cost a quarter of all products at 1000 keys.
#pragma once

#include "../common/arena.h"
#include "../common/contrast_tiles.h"

SVITT_KERNELS_BEGIN

SVITT_INLINE bool holds_positives(const Contrast& p, const DotTile& t) {
  bool found = false;
  t.for_positives(p, [&](int, int, float) { found = true; });
  return found;
}

/// Adds, per lane, how many similarities of a row are finite and at most `best`: what is no number
/// counts against the query.
SVITT_INLINE vi count_beaten(const float* dots, int keys, float best, vi beaten) {
  const auto holds = [&](vf x) { return (x <= best) & (x > -kInfinity); };  // -1 where it does
  int c = 0;
  for (; c + W <= keys; c += W) beaten -= holds(load(dots + c));
  if (c < keys) beaten -= holds(load(dots + c)) & (lane_numbers() + c < keys);
  return beaten;
}

constexpr int kKeptTiles = 8;  // with positives, half a megabyte; more are computed twice

/// Queries [begin, end), `kStep` at a time; `compute` makes the similarities of a tile.
template <int kStep, class Compute>
SVITT_INLINE void rank_queries(const ContrastSearch& p, int64_t begin, int64_t end,
                               const Compute& compute) {
  constexpr int64_t kSize = kStep * kDotStride;
  Arena arena;
  float *dots = arena.take<float>(kSize), *kept = arena.take<float>(kKeptTiles * kSize);
  for (int64_t row = begin; row < end; row += kStep) {
    const int64_t rows = end - row < kStep ? end - row : kStep;
    float best[kStep];
    vi beaten[kStep];
    for (int64_t r = 0; r < rows; ++r) best[r] = -kInfinity, beaten[r] = vi{};
    int64_t tiles_kept[kKeptTiles];
    int count = 0;
    for (int64_t tile = 0; tile < p.tiles(); ++tile) {
      DotTile t = place_tile(p, row, rows, tile, count < kKeptTiles ? kept + count * kSize : dots);
      if (!holds_positives(p, t)) continue;
      compute(t);
      t.for_positives(p, [&](int r, int, float dot) {
        if (dot > best[r] && dot < kInfinity) best[r] = dot;
      });
      if (count < kKeptTiles) tiles_kept[count++] = tile;
    }
    int next = 0;
    for (int64_t tile = 0; tile < p.tiles(); ++tile) {
      const bool known = next < count && tiles_kept[next] == tile;
      DotTile t = place_tile(p, row, rows, tile, known ? kept + next++ * kSize : dots);
      if (!known) compute(t);
      for (int64_t r = 0; r < rows; ++r)
        beaten[r] = count_beaten(t.dots + r * kDotStride, t.keys, best[r], beaten[r]);
    }
    for (int64_t r = 0; r < rows; ++r) {
      int64_t rank = p.keys;  // also where no positive has a finite similarity: nothing is beaten
      for (int i = 0; i < W; ++i) rank -= beaten[r][i];
      p.found[row + r] = rank;
    }
  }
}

inline void contrast_rank(const ContrastSearch& p, int64_t begin, int64_t end) {
  rank_queries<kDotRows>(p, begin, end, [&](DotTile& t) { t.compute(p); });
}

SVITT_KERNELS_END
