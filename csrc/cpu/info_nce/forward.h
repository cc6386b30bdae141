// Forward: a thread owns a tile of keys and all their columns; rows are parts, one per tile.
// Included inside namespace svitt::SVITT_ISA after common/contrast_tiles.h.

SVITT_INLINE float exp_float(float x) { return exp_nonpositive(splat(x))[0]; }

SVITT_INLINE void clear(Tally& t) { t = {-kInfinity, -kInfinity, 0, 0, 0, 0, 0}; }

SVITT_INLINE void add_positive(Tally& t, float dot, float scale) {
  const double x = static_cast<double>(dot) * scale;
  if (x > t.positive_most) {
    const float before = static_cast<float>(t.positive_most - x);
    t.positive_sum = t.count == 0 ? 1.0f : t.positive_sum * exp_float(before) + 1.0f;
    t.positive_most = x;
  } else {
    t.positive_sum += exp_float(static_cast<float>(x - t.positive_most));
  }
  t.same += dot;
  ++t.count;
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
    add_positive(of_rows[r], dot, p.scale);
    if (of_keys != nullptr) add_positive(of_keys[c], dot, p.scale);
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

void contrast_forward(const ContrastForward& p, int64_t chunk, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  Arena arena;
  float* dots = arena.take<float>(kDotRows * kDotStride);
  for (int64_t tile = begin; tile < end; ++tile) {
    Tally* of_keys = key_tallies(p, chunk, tile);
    Tally* of_rows = p.row_parts + tile * p.chunk_rows();
    const int64_t start = chunk * kQueryChunk;
    for (int64_t row = start; row < chunk_end(p, chunk); row += kDotRows) {
      DotTile t = dot_tile(p, chunk, row, tile, dots);
      t.compute(p);
      add_tile(p, t, of_rows + (row - start), of_keys);
    }
  }
}
