// The loss against a batch and a queue: one sweep, in which the candidates are also the values that
// the gradient sums. Included inside namespace svitt::SVITT_ISA after info_nce_backward.h.

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

  DotTile some_rows(int64_t row, int64_t limit, int most, float* dots) const {
    DotTile t{};
    t.row = row, t.rows = static_cast<int>(limit - row < most ? limit - row : most);
    t.keys = static_cast<int>(keys), t.dots = dots;
    return t;
  }

  TileOperands tiled(uint16_t* columns_to, uint16_t* values_to) const {
    return {row_of<uint16_t>(data, step, first), step, keys, dim, nullptr, columns_to, values_to};
  }

  template <class T>
  void pack(float* to, float* panels) {
    const T* from = row_of<T>(data, step, first);
    const int count = static_cast<int>(keys);
    pack_columns(from, step, count, dim, to, kKeyTile);
    if (panels != nullptr) pack_panels<T>(from, step, dim, 0, count, kKeyTile, panels);
    columns = to;
  }
  void pack(float* to, float* panels) {
    switch (dtype) {
      case Dtype::f32: return pack<float>(to, panels);
      case Dtype::bf16: return pack<bf16>(to, panels);
      case Dtype::f16: return pack<fp16>(to, panels);
    }
  }
};

struct QueueScratch {
  Arena arena;
  float *dots, *taught, *weights, *columns, *panels;

  explicit QueueScratch(const ContrastQueue& p) {
    dots = arena.take<float>(kDotRows * kDotStride);
    taught = arena.take<float>(kDotRows * kDotStride);
    weights = arena.take<float>(kDotRows * kGradStride);
    columns = arena.take<float>(static_cast<int64_t>(kKeyTile) * p.dim);
    panels = arena.take<float>(static_cast<int64_t>(kKeyTile) * p.padded_dim());
  }
};

/// The negatives of a tile join one distribution's sums of weights and of weighted similarities;
/// `sums`, of weighted candidates or null, are made ready for theirs.
SVITT_INLINE void weigh_candidates(const ContrastQueue& p, const DotTile& t, const float* centres,
                           const DotTile& student, QueueTally* of_rows, SoftSum QueueTally::* which,
                           float* weights, float* sums) {
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

SVITT_INLINE void add_candidates(const ContrastQueue& p, const DotTile& t, const QueueScratch& s,
                                 float* sums) {
  const int step = p.padded_dim();
  float* to[kDotRows];
  for (int panel = 0; panel * kPanel < p.dim; ++panel) {
    for (int r = 0; r < t.rows; ++r) to[r] = sums + r * step + panel * kPanel;
    multiply_pieces(t.rows, s.weights, {kGradStride, 1},
                    s.panels + static_cast<int64_t>(panel) * kKeyTile * kPanel, t.keys, to, true);
  }
}

/// A chunk of queries by a split of the candidates, its sums empty.
struct QueueItem {
  int64_t start, limit;       // queries
  int64_t first, last;        // tiles of candidates
  int64_t size;               // of the sums of one distribution
  QueueTally* tallies;        // of query 0
  float* sums;                // of query 0, or null

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

void contrast_queue(const ContrastQueue& p, int64_t begin, int64_t end) {
  const QueueScratch s(p);
  for (int64_t item = begin; item < end; ++item) {
    const QueueItem of(p, item);
    for (int64_t n = of.first; n < of.last; ++n) {
      Candidates tile(p, n);
      tile.pack(s.columns, p.gradients ? s.panels : nullptr);
      Candidates taught = tile;
      taught.rows = const_cast<float*>(p.teacher), taught.row_step = p.teacher_step;
      for (int64_t row = of.start; row < of.limit; row += kDotRows) {
        DotTile t = tile.some_rows(row, of.limit, kDotRows, s.dots), other = t;
        other.dots = s.taught;
        float* sums = of.sums == nullptr ? nullptr : of.sums + row * p.padded_dim();
        const auto add = [&](const DotTile& x, const float* centres,
                             SoftSum QueueTally::* which, float* to) {
          weigh_candidates(p, x, centres, t, of.tallies + row, which, s.weights, to);
          if (to != nullptr) add_candidates(p, x, s, to);
        };
        t.compute(tile);
        if (p.teacher != nullptr) other.compute(taught), other.keep_negatives(taught);
        t.keep_negatives(tile);
        add(t, p.centres, &QueueTally::student, sums);
        if (p.teacher != nullptr)
          add(other, p.teacher_centres, &QueueTally::teacher,
              sums == nullptr ? nullptr : sums + of.size);
      }
    }
  }
}

template <class T>
SVITT_INLINE float dot_rows(const float* a, const T* b, int dim) {
  vf sum{};
  for (int d = 0; d < dim; d += W) sum += load_some(a + d, dim - d) * load_some(b + d, dim - d);
  return hsum(sum);
}

template <class T>
void queue_centres(const ContrastQueue& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* own = row_of<T>(p.key, p.key_step, row);
    p.centres[row] = dot_rows(p.rows + row * p.row_step, own, p.dim);
    if (p.teacher != nullptr)
      p.teacher_centres[row] = dot_rows(p.teacher + row * p.teacher_step, own, p.dim);
  }
}

void contrast_queue_centres(const ContrastQueue& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::f32: return queue_centres<float>(p, begin, end);
    case Dtype::bf16: return queue_centres<bf16>(p, begin, end);
    case Dtype::f16: return queue_centres<fp16>(p, begin, end);
  }
}

/// A positive of one query: logits and similarity less those of the own pair.
struct Positive {
  const void* row;
  double logit, taught, similarity;
};

/// One distribution of a query: the parts of its negatives together, and its positives.
struct Distribution {
  double most = -kInfinity, sum = 0.0, mean = 0.0;  // of the negatives; mean similarity
  double positive = -kInfinity;                     // log-sum-exp of the positives
  double total, lost;                               // log-sum-exp of all, share of the negatives
  double expected;                                  // similarity

  Distribution(const QueueTally* parts, SoftSum QueueTally::* which, int64_t splits, int64_t step,
               const Positive* positives, double Positive::* logit, int64_t count) {
    for (int64_t n = 0; n < splits; ++n) most = vmax(most, (parts[n * step].*which).most);
    for (int64_t n = 0; n < splits; ++n) {
      const SoftSum& part = parts[n * step].*which;
      const double weight = part.sum == 0.0f ? 0.0 : __builtin_exp(part.most - most);
      sum += weight * part.sum, mean += weight * part.moment;
    }
    if (sum > 0.0) mean /= sum;
    double high = -kInfinity, weights = 0.0, moment = 0.0;
    for (int64_t i = 0; i < count; ++i) high = vmax(high, positives[i].*logit);
    for (int64_t i = 0; i < count; ++i) {
      const double weight = __builtin_exp(positives[i].*logit - high);
      weights += weight, moment += weight * positives[i].similarity;
    }
    if (count > 0) positive = high + __builtin_log(weights);
    const double negative = sum > 0.0 ? most + __builtin_log(sum) : -kInfinity;
    total = log_sum(negative, positive);
    lost = __builtin_exp(negative - total);
    expected = lost * mean + (count > 0 ? __builtin_exp(positive - total) * moment / weights : 0.0);
  }
  /// What the weighted candidates of a part count for.
  float share(const SoftSum& part) const {
    return part.sum == 0.0f ? 0.0f
                            : static_cast<float>(__builtin_exp(part.most - most) * lost / sum);
  }

 private:
  static double vmax(double a, double b) { return a > b ? a : b; }
};

/// The positives of a query, in order; returns how many.
template <class T>
int64_t find_positives(const ContrastQueue& p, int64_t row, Positive* found) {
  int64_t count = 0;
  const auto add = [&](const T* candidate, bool own) {
    Positive& one = found[count++];
    one = {candidate, 0.0, 0.0, 0.0};
    if (own) return;
    one.similarity =
        static_cast<double>(dot_rows(p.rows + row * p.row_step, candidate, p.dim)) - p.centres[row];
    one.logit = one.similarity * p.scale;
    if (p.teacher == nullptr) return;
    const float dot = dot_rows(p.teacher + row * p.teacher_step, candidate, p.dim);
    one.taught = (static_cast<double>(dot) - p.teacher_centres[row]) * p.scale;
  };
  if (p.query_ids == nullptr) {
    add(row_of<T>(p.key, p.key_step, row), true);
    return count;
  }
  const int32_t id = p.query_ids[row];
  for (int64_t j = 0; j < p.keys; ++j)
    if (p.key_ids[j] == id) add(row_of<T>(p.key, p.key_step, j), j == row);
  for (int64_t j = 0; p.queue_ids != nullptr && j < p.queue_rows; ++j)
    if (p.queue_ids[j] == id) add(row_of<T>(p.queue, p.queue_step, j), false);
  return count;
}

/// Loss of some queries, the sum of weight times similarity, and the gradient.
template <class T>
void queue_finish(const ContrastQueue& p, int64_t begin, int64_t end) {
  Arena arena;
  Positive* positives = arena.take<Positive>(p.keys + p.queue_rows);
  const int64_t step = p.padded_dim(), size = p.padded_queries() * step;
  const bool taught = p.teacher != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t count = find_positives<T>(p, row, positives);
    const QueueTally* parts = p.tallies + row;
    const Distribution student(parts, &QueueTally::student, p.splits, p.queries, positives,
                               &Positive::logit, count);
    const Distribution teacher = taught
                                     ? Distribution(parts, &QueueTally::teacher, p.splits,
                                                    p.queries, positives, &Positive::taught, count)
                                     : student;
    const double alpha = p.alpha, hard = count > 0 ? 1.0 - alpha : 0.0, all = hard + alpha;
    double same = 0.0;
    for (int64_t i = 0; i < count; ++i) same += positives[i].similarity;
    if (count > 0) same /= static_cast<double>(count);
    p.losses[row] = all * student.total - p.scale * (hard * same + alpha * teacher.expected);
    if (!p.gradients) continue;

    double moment = all * student.lost * student.mean - alpha * teacher.lost * teacher.mean;
    float* grad = p.grad + row * p.dim;
    for (int d = 0; d < p.dim; ++d) grad[d] = 0.0f;
    for (int64_t n = 0; n < p.splits; ++n) {
      const QueueTally& part = parts[n * p.queries];
      const float* sums = p.sums + n * p.distributions() * size + row * step;
      const float weight = static_cast<float>(all) * student.share(part.student);
      for (int d = 0; d < p.dim; ++d) grad[d] += weight * sums[d];
      if (!taught) continue;
      const float other = static_cast<float>(alpha) * teacher.share(part.teacher);
      for (int d = 0; d < p.dim; ++d) grad[d] -= other * sums[size + d];
    }
    // A positive weighs softmax less target, from the negatives' shares: of a single one, what
    // would cancel is left out.
    for (int64_t i = 0; i < count; ++i) {
      const Positive& one = positives[i];
      double weight = alpha * teacher.lost - student.lost;
      if (count > 1) {
        const double among = __builtin_exp(one.logit - student.positive),
                     other = taught ? __builtin_exp(one.taught - teacher.positive) : 0.0;
        weight = among - alpha * other - hard / static_cast<double>(count) +
                 alpha * teacher.lost * other - student.lost * among;
      }
      moment += weight * one.similarity;
      const T* candidate = static_cast<const T*>(one.row);
      for (int d = 0; d < p.dim; ++d)
        grad[d] += static_cast<float>(weight) * to_float(candidate[d]);
    }
    p.moments[row] = moment;
    const float factor = p.scale / static_cast<float>(p.queries);
    for (int d = 0; d < p.dim; ++d) grad[d] *= factor;
  }
}

void contrast_queue_finish(const ContrastQueue& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::f32: return queue_finish<float>(p, begin, end);
    case Dtype::bf16: return queue_finish<bf16>(p, begin, end);
    case Dtype::f16: return queue_finish<fp16>(p, begin, end);
  }
}
