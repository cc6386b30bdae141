// The loss against a batch and a queue for bf16 on the AMX matrix tiles, as info_nce_queue.h.
// Included inside namespace svitt::avx512 after that file and info_nce_amx.h.

struct TiledQueueScratch {
  Arena arena;
  float *dots, *taught, *weights;
  uint16_t *rounded, *columns, *values;

  explicit TiledQueueScratch(const ContrastQueue& p) {
    dots = arena.take<float>(kAmxRows * kDotStride);
    taught = arena.take<float>(kAmxRows * kDotStride);
    weights = arena.take<float>(kAmxRows * kGradStride);
    rounded = arena.take<uint16_t>(kAmxRows * kRoundedStride);
    columns = arena.take<uint16_t>(static_cast<int64_t>(kKeyTile) * p.padded_dim());
    values = arena.take<uint16_t>(static_cast<int64_t>(kKeyTile) * p.padded_dim());
  }
};

void contrast_queue_amx(const ContrastQueue& p, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  {
    const TiledQueueScratch s(p);
    const int step = p.padded_dim();
    for (int64_t item = begin; item < end; ++item) {
      const QueueItem of(p, item);
      for (int64_t n = of.first; n < of.last; ++n) {
        const Candidates tile(p, n);
        const TileOperands candidates = tile.tiled(s.columns, p.gradients ? s.values : nullptr);
        contrast_pack_amx(candidates, 0, candidates.groups());
        for (int64_t row = of.start; row < of.limit; row += kAmxRows) {
          DotTile t = tile.some_rows(row, of.limit, kAmxRows, s.dots), other = t;
          other.dots = s.taught;
          float* sums = of.sums == nullptr ? nullptr : of.sums + row * step;
          const auto add = [&](const DotTile& x, const float* centres,
                               SoftSum QueueTally::* which, float* to) {
            weigh_candidates(p, x, centres, t, of.tallies + row, which, s.weights, to);
            if (to == nullptr) return;
            round_weights(s.weights, x.rows, x.keys, s.rounded, kRoundedStride, nullptr);
            multiply_amx(round_up(x.rows, kPairs), step, round_up(x.keys, kPairs), s.rounded,
                         kRoundedStride, values_of(candidates, 0), to, step, true);
          };
          compute_amx(t, p.tiled_queries, candidates);
          if (p.teacher != nullptr) {
            compute_amx(other, p.tiled_teacher, candidates);
            other.keep_negatives(tile);
          }
          t.keep_negatives(tile);
          add(t, p.centres, &QueueTally::student, sums);
          if (p.teacher != nullptr)
            add(other, p.teacher_centres, &QueueTally::teacher,
                sums == nullptr ? nullptr : sums + of.size);
        }
      }
    }
  }
  _tile_release();
}
