// Searches among the keys: a sampled negative, and the rank of the best positive. Items are
// queries. Included inside namespace svitt::SVITT_ISA after info_nce/forward.h.
//
// Ranks take two looks at each row: the best positive, then all keys. Tiles that hold positives are
// kept between the two; computing them twice cost a quarter of all products at 1000 keys.

/// Some queries by a tile of keys, not computed yet.
SVITT_INLINE DotTile place_tile(const Contrast& p, int64_t row, int64_t rows, int64_t tile,
                                float* dots) {
  DotTile t{};
  const int64_t left = p.keys - tile * kKeyTile;
  t.row = row, t.tile = tile, t.first_key = tile * kKeyTile, t.dots = dots;
  t.rows = static_cast<int>(rows), t.keys = static_cast<int>(left < kKeyTile ? left : kKeyTile);
  return t;
}

SVITT_INLINE DotTile some_tile(const Contrast& p, int64_t row, int64_t rows, int64_t tile,
                               float* dots) {
  DotTile t = place_tile(p, row, rows, tile, dots);
  t.compute(p);
  return t;
}

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

void contrast_sample(const ContrastSearch& p, int64_t begin, int64_t end) {
  Arena arena;
  float* dots = arena.take<float>(kDotRows * kDotStride);
  Tally* parts = arena.take<Tally>(p.tiles() * kDotRows);
  for (int64_t row = begin; row < end; row += kDotRows) {
    const int64_t rows = end - row < kDotRows ? end - row : kDotRows;
    for (int64_t tile = 0; tile < p.tiles(); ++tile) {
      DotTile t = some_tile(p, row, rows, tile, dots);
      Tally* of_rows = parts + tile * kDotRows;
      for (int64_t r = 0; r < rows; ++r) clear(of_rows[r]);
      keep_choices(p, t);
      sum_apart(p, t, of_rows, nullptr);
    }
    for (int64_t r = 0; r < rows; ++r) {
      double most = -kInfinity, sum = 0.0;
      for (int64_t tile = 0; tile < p.tiles(); ++tile)
        if (parts[tile * kDotRows + r].most > most) most = parts[tile * kDotRows + r].most;
      const auto weight = [&](int64_t tile) {
        const Tally& part = parts[tile * kDotRows + r];
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
      DotTile t = some_tile(p, row + r, 1, chosen, dots);
      keep_choices(p, t);
      p.found[row + r] = pass(p, t, most, left);
    }
  }
}

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

void contrast_rank(const ContrastSearch& p, int64_t begin, int64_t end) {
  constexpr int64_t kSize = kDotRows * kDotStride;
  Arena arena;
  float *dots = arena.take<float>(kSize), *kept = arena.take<float>(kKeptTiles * kSize);
  for (int64_t row = begin; row < end; row += kDotRows) {
    const int64_t rows = end - row < kDotRows ? end - row : kDotRows;
    float best[kDotRows];
    vi beaten[kDotRows];
    for (int64_t r = 0; r < rows; ++r) best[r] = -kInfinity, beaten[r] = vi{};
    int64_t tiles_kept[kKeptTiles];
    int count = 0;
    for (int64_t tile = 0; tile < p.tiles(); ++tile) {
      DotTile t = place_tile(p, row, rows, tile, count < kKeptTiles ? kept + count * kSize : dots);
      if (!holds_positives(p, t)) continue;
      t.compute(p);
      t.for_positives(p, [&](int r, int, float dot) {
        if (dot > best[r] && dot < kInfinity) best[r] = dot;
      });
      if (count < kKeptTiles) tiles_kept[count++] = tile;
    }
    int next = 0;
    for (int64_t tile = 0; tile < p.tiles(); ++tile) {
      const bool known = next < count && tiles_kept[next] == tile;
      DotTile t = place_tile(p, row, rows, tile, known ? kept + next++ * kSize : dots);
      if (!known) t.compute(p);
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
