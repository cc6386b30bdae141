// Products of the loss against a batch and a queue on the AMX matrix tiles.
// Included inside namespace svitt::avx512 after sweep.h and common/amx_contrast.h.

struct TiledQueueProducts {
  static constexpr int kStep = kAmxRows;
  const ContrastQueue& p;
  Arena arena;
  TileOperands candidates{};
  uint16_t *columns, *values, *copy, *rounded;

  explicit TiledQueueProducts(const ContrastQueue& problem) : p(problem) {
    columns = arena.take<uint16_t>(static_cast<int64_t>(kKeyTile) * p.padded_dim());
    values = arena.take<uint16_t>(static_cast<int64_t>(kKeyTile) * p.padded_dim());
    copy = arena.take<uint16_t>(kTileRows * p.padded_dim());
    rounded = arena.take<uint16_t>(kAmxRows * kRoundedStride);
  }
  void pack(const Candidates& tile) {
    candidates = tile.tiled(columns, p.gradients ? values : nullptr);
    pack_operands(candidates, 0, candidates.groups(), copy);
  }
  void compute(const Candidates&, DotTile& t, bool of_teacher) {
    compute_amx(t, of_teacher ? p.tiled_teacher : p.tiled_queries, candidates);
  }
  void add(const DotTile& t, const float* weights, float* sums) {
    round_weights(weights, t.rows, t.keys, rounded, kRoundedStride, nullptr);
    multiply_amx(round_up(t.rows, kPairs), p.padded_dim(), round_up(t.keys, kPairs), rounded,
                 kRoundedStride, values_of(candidates, 0), sums, p.padded_dim(), true);
  }
};

void contrast_queue_amx(const ContrastQueue& p, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  {
    TiledQueueProducts products(p);
    sweep_candidates(p, products, begin, end);
  }
  _tile_release();
}
