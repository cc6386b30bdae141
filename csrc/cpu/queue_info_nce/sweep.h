// The loss against a batch and a queue: one sweep, in which the candidates are also the values that
// the gradient sums.
#pragma once

#include "../common/arena.h"
#include "../common/contrast_sums.h"
#include "../common/contrast_tiles.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

/// A tile of candidates, of the batch or of the queue, as a problem of its own.
struct Candidates : Contrast {
  int64_t first;  // in the batch or in the queue
  const void* data;
  int64_t step;

  Candidates(const ContrastQueue& p, int64_t tile) : Contrast(p) {
    const bool queued = tile >= p.tiles();
    first = (queued ? tile - p.tiles() : tile) * kKeyTile;
    const int64_t left = (queued ? p.queue_rows : p.keys) - first;
    keys = left < kKeyTile ? left : kKeyTile;
    data = queued ? p.queue : p.key, step = queued ? p.queue_step : p.key_step;
    key_ids = queued ? p.queue_ids : p.key_ids;
    if (key_ids != nullptr) key_ids += first;
    first_row = queued ? -p.queries - kKeyTile : -first;  // without ids a queue has no positives
  }

  template <class Lane>
  TileOperands tiled(uint16_t* columns_to, uint16_t* values_to) const {
    const Lane* from = row_of<Lane>(data, step, first);
    return {dtype, from, step, keys, dim, nullptr, columns_to, values_to};
  }

  template <class T>
  void pack(float* to, float* panels) const {
    const T* from = row_of<T>(data, step, first);
    const int count = static_cast<int>(keys);
    pack_columns(from, step, count, dim, to, kKeyTile);
    if (panels != nullptr) pack_panels<T>(from, step, dim, 0, count, kKeyTile, panels);
  }
  void pack(float* to, float* panels) const {
    with_type(dtype, [&](auto x) { pack<decltype(x)>(to, panels); });
  }
};

/// The negatives of a tile join one distribution's sums of weights and of weighted similarities;
/// `sums`, of weighted candidates or null, are made ready for theirs.
SVITT_INLINE void weigh_candidates(const ContrastQueue& p, const DotTile& t, const float* centres,
                                   const DotTile& student, QueueTally* of_rows,
                                   SoftSum QueueTally::* which, float* weights, float* sums) {
  const int step = p.padded_dim();
  const vf scale = splat(p.scale);
  for (int r = 0; r < t.rows; ++r) {
    SoftSum& of_row = of_rows[r].*which;
    const float *x = t.dots + r * kDotStride, *y = student.dots + r * kDotStride;
    float* to = weights + r * kGradStride;
    vf maxima = splat(-kInfinity);
    for (int c = 0; c < t.keys; c += W) maxima = vmax(maxima, load(x + c));
    const float highest = hmax(maxima), centre = centres[t.row + r];
    if (highest == -kInfinity) {
      for (int c = 0; c < t.keys; c += W) store(to + c, vf{});
      continue;
    }
    const double zero = static_cast<double>(centre) * p.scale,
                 most = static_cast<double>(highest) * p.scale - zero;
    if (most > of_row.most) {
      const float before = static_cast<float>(of_row.most - most);
      const float factor = of_row.sum == 0.0f ? 0.0f : exp_float(before);
      of_row.sum *= factor, of_row.moment *= factor, of_row.most = most;
      if (sums != nullptr) {
        float* sum = sums + r * step;
        for (int d = 0; d < step; d += W) store(sum + d, load(sum + d) * factor);
      }
    }
    // Two floats: one is not enough where it is large.
    const float high = static_cast<float>(of_row.most + zero),
                low = static_cast<float>(of_row.most + zero - high);
    const vf offset = splat(-high), rest = splat(low), own = splat(p.centres[t.row + r]);
    vf sum{}, moment{};
    for (int c = 0; c < t.keys; c += W) {
      const vf dot = load(x + c);
      const vf e = exp_nonpositive(multiply_add(dot, scale, offset) - rest);
      store(to + c, e);
      sum += e;
      moment += dot == -kInfinity ? vf{} : e * (load(y + c) - own);
    }
    of_row.sum += hsum(sum), of_row.moment += hsum(moment);
  }
}

/// Rows with a similarity that is no logit have no sums: NaN stays NaN whatever joins it.
SVITT_INLINE void mark_unusable(const ContrastQueue& p, const DotTile& t, QueueTally* of_rows,
                                SoftSum QueueTally::* which) {
  for (int r = 0; r < t.rows; ++r)
    if (t.unusable(r, p.limit))
      (of_rows[r].*which).sum = (of_rows[r].*which).moment = __builtin_nanf("");
}

/// A chunk of queries by a split of the candidates, its sums empty.
struct QueueItem {
  int64_t start, limit;  // queries
  int64_t first, last;   // tiles of candidates
  int64_t size;          // of the sums of one distribution
  QueueTally* tallies;   // of query 0
  float* sums;           // of query 0, or null

  QueueItem(const ContrastQueue& p, int64_t item) {
    const int64_t chunk = item / p.splits, split = item % p.splits, step = p.padded_dim();
    start = chunk * kQueryChunk, limit = chunk_end(p, chunk);
    first = p.all_tiles() * split / p.splits, last = p.all_tiles() * (split + 1) / p.splits;
    size = p.padded_queries() * step;
    tallies = p.tallies + split * p.queries;
    sums = p.gradients ? p.sums + split * p.distributions() * size : nullptr;
    for (int64_t row = start; row < limit; ++row)
      tallies[row] = {{-kInfinity, 0.0f, 0.0f}, {-kInfinity, 0.0f, 0.0f}};
    const int64_t rows = round_up(static_cast<int>(limit - start), 32);
    for (int i = 0; sums != nullptr && i < p.distributions(); ++i)
      std::memset(sums + i * size + start * step, 0, sizeof(float) * rows * step);
  }
};

/// Items [begin, end), a few queries at a time; the products are given.
template <class Products>
void sweep_candidates(const ContrastQueue& p, Products& products, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  Arena& arena = products.arena;
  constexpr int kStep = Products::kStep;
  float *dots = arena.template take<float>(kStep * kDotStride),
        *taught = arena.template take<float>(kStep * kDotStride),
        *weights = arena.template take<float>(kStep * kGradStride);
  const bool soft = p.teacher != nullptr;
  for (int64_t item = begin; item < end; ++item) {
    const QueueItem of(p, item);
    for (int64_t n = of.first; n < of.last; ++n) {
      const Candidates tile(p, n);
      products.pack(tile);
      for (int64_t row = of.start; row < of.limit; row += kStep) {
        const int64_t left = of.limit - row;
        DotTile t = place_tile(tile, row, left < kStep ? left : kStep, 0, dots), other = t;
        other.dots = taught;
        products.compute(tile, t, false);
        mark_unusable(p, t, of.tallies + row, &QueueTally::student);
        if (soft) {
          products.compute(tile, other, true);
          mark_unusable(p, other, of.tallies + row, &QueueTally::teacher);
          other.keep_negatives(tile);
        }
        t.keep_negatives(tile);
        const auto add = [&](const DotTile& x, const float* centres, SoftSum QueueTally::* which,
                             int64_t distribution) {
          float* sums = of.sums;
          if (sums != nullptr) sums += distribution * of.size + row * p.padded_dim();
          weigh_candidates(p, x, centres, t, of.tallies + row, which, weights, sums);
          if (sums != nullptr) products.add(x, weights, sums);
        };
        add(t, p.centres, &QueueTally::student, 0);
        if (soft) add(other, p.teacher_centres, &QueueTally::teacher, 1);
      }
    }
  }
}

/// Products in fp32.
struct QueueProducts {
  static constexpr int kStep = kDotRows;
  const ContrastQueue& p;
  Arena arena;
  float *columns, *panels;

  explicit QueueProducts(const ContrastQueue& problem) : p(problem) {
    columns = arena.take<float>(static_cast<int64_t>(kKeyTile) * p.dim);
    panels = arena.take<float>(static_cast<int64_t>(kKeyTile) * p.padded_dim());
  }
  void pack(const Candidates& tile) { tile.pack(columns, p.gradients ? panels : nullptr); }
  void compute(const Candidates& tile, DotTile& t, bool of_teacher) {
    Contrast of = tile;
    of.columns = columns;
    if (of_teacher) of.rows = const_cast<float*>(p.teacher), of.row_step = p.teacher_step;
    t.compute(of);
  }
  void add(const DotTile& t, const float* weights, float* sums) {
    float* to[kDotRows];
    for (int panel = 0; panel * kPanel < p.dim; ++panel) {
      for (int r = 0; r < t.rows; ++r) to[r] = sums + r * p.padded_dim() + panel * kPanel;
      multiply_pieces(t.rows, weights, {kGradStride, 1},
                      panels + static_cast<int64_t>(panel) * kKeyTile * kPanel, t.keys, to, true);
    }
  }
};

inline void contrast_queue(const ContrastQueue& p, int64_t begin, int64_t end) {
  QueueProducts products(p);
  sweep_candidates(p, products, begin, end);
}

SVITT_KERNELS_END
