// Searches among the keys: a sampled negative, and the rank of the best positive. Items are
// queries. Included inside namespace svitt::SVITT_ISA after info_nce_forward.h.

SVITT_INLINE DotTile some_tile(const Contrast& p, int64_t row, int64_t rows, int64_t tile,
                               float* dots) {
  DotTile t{};
  const int64_t left = p.keys - tile * kKeyTile;
  t.row = row, t.tile = tile, t.first_key = tile * kKeyTile, t.dots = dots;
  t.rows = static_cast<int>(rows), t.keys = static_cast<int>(left < kKeyTile ? left : kKeyTile);
  t.compute(p);
  return t;
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
      t.keep_negatives(p);
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
      t.keep_negatives(p);
      p.found[row + r] = pass(p, t, most, left);
    }
  }
}

/// Whether a tile can hold positives of some rows.
SVITT_INLINE bool may_match(const Contrast& p, int64_t row, int64_t rows, int64_t tile) {
  if (p.key_ids != nullptr) return true;
  const int64_t first = p.first_row + row - tile * kKeyTile;
  return first < kKeyTile && first + rows > 0;
}

void contrast_rank(const ContrastSearch& p, int64_t begin, int64_t end) {
  Arena arena;
  float* dots = arena.take<float>(kDotRows * kDotStride);
  for (int64_t row = begin; row < end; row += kDotRows) {
    const int64_t rows = end - row < kDotRows ? end - row : kDotRows;
    float best[kDotRows];
    int64_t above[kDotRows];
    for (int64_t r = 0; r < rows; ++r) best[r] = -kInfinity, above[r] = 0;
    for (int64_t tile = 0; tile < p.tiles(); ++tile)
      if (may_match(p, row, rows, tile))
        some_tile(p, row, rows, tile, dots).for_positives(p, [&](int r, int, float dot) {
          if (dot > best[r]) best[r] = dot;
        });
    for (int64_t tile = 0; tile < p.tiles(); ++tile) {
      const DotTile t = some_tile(p, row, rows, tile, dots);
      for (int64_t r = 0; r < rows; ++r) {
        const float* x = dots + r * kDotStride;
        vi count{};
        for (int c = 0; c < t.keys; c += W) {
          const vi higher = load(x + c) > best[r];  // -1 where it holds
          count -= higher & (lane_numbers() + c < t.keys);
        }
        for (int i = 0; i < W; ++i) above[r] += count[i];
      }
    }
    for (int64_t r = 0; r < rows; ++r) p.found[row + r] = best[r] == -kInfinity ? p.keys : above[r];
  }
}
