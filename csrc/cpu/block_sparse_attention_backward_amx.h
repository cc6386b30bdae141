// Backward for bf16 on the AMX matrix tiles: the sweep of block_sparse_attention_backward.h with
// its five products on 16 x 16 tiles.
// Included inside namespace svitt::avx512 after that file and amx_products.h.
//
// The tokens of a block of keys lie side by side, so that K and V serve as left operands in place.
// Only weights and slopes are rounded to bf16; logits, their gradients, that of the bias table and
// all sums stay in fp32.
//
// Tried, without gain: huge pages for the results, which the heap mostly has in place.

static_assert(kRowTile == kStride && kKeyTile == kStride);

struct TileBackwardScratch {
  using Value = bf16;
  Arena arena;
  int width;  // head_dim
  // Of a row tile, packed for products over dims, and over rows.
  uint16_t *query, *grad_out, *query_pairs, *grad_pairs;
  uint16_t *keys, *key_pairs;
  uint16_t *weights, *slopes, *turned;  // keys by rows, turned rows by keys
  float *logits, *products;             // of K Q^T and of V dO^T
  float *lse, *lse_low, *delta;
  float *grad_query, *grad_key, *grad_value, *sum;
  LaneCodes* lanes;

  explicit TileBackwardScratch(const Backward& p) : width(p.head_dim) {
    const int64_t rows = kStride * width, block = kStride * kStride;
    query = arena.take<uint16_t>(rows);
    grad_out = arena.take<uint16_t>(rows);
    query_pairs = arena.take<uint16_t>(rows);
    grad_pairs = arena.take<uint16_t>(rows);
    keys = arena.take<uint16_t>(rows);
    key_pairs = arena.take<uint16_t>(rows);
    weights = arena.take<uint16_t>(block);
    slopes = arena.take<uint16_t>(block);
    turned = arena.take<uint16_t>(block);
    logits = arena.take<float>(block);
    products = arena.take<float>(block);
    lse = arena.take<float>(kStride);
    lse_low = arena.take<float>(kStride);
    delta = arena.take<float>(kStride);
    grad_query = arena.take<float>(rows);
    sum = arena.take<float>(rows);
    grad_key = arena.take<float>(p.tokens * width);
    grad_value = arena.take<float>(p.tokens * width);
    lanes = arena.take<LaneCodes>(kStride / W);
  }
  void stage(const Backward& p, int64_t, int64_t) {
    std::memset(grad_key, 0, sizeof(float) * p.tokens * width);
    std::memset(grad_value, 0, sizeof(float) * p.tokens * width);
  }
};

/// Queries, upstream gradient, log-sum-exp and delta = rowsum(dO O) of a tile.
void load_tile(const Backward& p, const RowTile& t, TileBackwardScratch& s) {
  const int lanes = round_up(t.rows, kTileRows), dims = s.width;
  const auto reader = [&](const Matrix& m) {
    const uint16_t* data = base<uint16_t>(m, t.b, t.h) + t.row * m.token;
    return [=](int r) { return r < t.rows ? data + r * m.token : nullptr; };
  };
  const auto query = reader(p.query), grad = reader(p.grad_out);
  pack_key_tiles(query, lanes, dims, s.query);
  pack_key_tiles(grad, lanes, dims, s.grad_out);
  pack_value_tiles(query, lanes, dims, s.query_pairs);
  pack_value_tiles(grad, lanes, dims, s.grad_pairs);
  row_products(reader(p.out), s.grad_out, lanes, dims, s.keys, s.products, s.delta);
  describe_rows(p, t, s);
}

/// Weights and scaled gradients of the logits of n keys, zeros from there to `padded`.
template <bool Bias>
SVITT_INLINE void differentiate_pairs(const Backward& p, const RowTile& t,
                                      const TileBackwardScratch& s, int key, int n, int padded) {
  constexpr float kLog2e = 1.4426950408889634f;
  for (int c = 0; c < t.rows; c += kPairs) {
    for (int j = 0; j < padded; ++j) {
      vf weight[2]{}, slope[2]{};
#pragma GCC unroll 2
      for (int k = 0; k < 2 && j < n; ++k) {
        const int lane = c + k * W, at = j * kStride + lane;
        if (Bias && lane >= t.columns) break;
        vf x = load(s.logits + at) * p.scale;
        if constexpr (Bias) x += bias_of_key<false>(p, t, s.lanes, key + j, lane, vf{});
        x = x - load(s.lse + lane) - load(s.lse_low + lane);
        weight[k] = exp2_bf16(x * kLog2e);
        slope[k] = weight[k] * (load(s.products + at) - load(s.delta + lane));
        if constexpr (Bias) bias_of_key<true>(p, t, s.lanes, key + j, lane, slope[k]);
        slope[k] *= p.scale;
      }
      _mm512_storeu_si512(s.weights + j * kStride + c, round_pairs(weight[0], weight[1]));
      _mm512_storeu_si512(s.slopes + j * kStride + c, round_pairs(slope[0], slope[1]));
    }
  }
}

/// Add the product of a block of weights with packed rows to the n rows at `to`.
SVITT_INLINE void add_product(const uint16_t* weights, const uint16_t* packed, int n, int padded,
                              int lanes, const TileBackwardScratch& s, float* to) {
  multiply_pairs(weights, packed, padded, lanes, s.width, s.sum, false);
  for (int i = 0; i < n * s.width; i += W) store(to + i, load(to + i) + load(s.sum + i));
}

/// All products of a row tile with keys [key, key + n).
void backward_keys(const Backward& p, const RowTile& t, TileBackwardScratch& s, int key, int n,
                   bool first) {
  const int dims = s.width, padded = round_up(n, kTileRows), lanes = round_up(t.rows, kTileRows);
  // Rows past the last key of a block are those of the next one: their products go nowhere.
  const auto multiply_tokens = [&](const Matrix& m, const uint16_t* packed, float* products) {
    const uint16_t* from = base<uint16_t>(m, t.b, t.h) + key * m.token;
    const bool in_place = key + padded <= p.tokens;
    if (!in_place)
      copy_pairs([&](int i) { return i < n ? from + i * m.token : nullptr; }, padded, dims, s.keys);
    multiply_dims(in_place ? from : s.keys, in_place ? m.token : dims, padded, packed, lanes, dims,
                  products);
  };
  multiply_tokens(p.key, s.query, s.logits);
  multiply_tokens(p.value, s.grad_out, s.products);
  if (t.table == nullptr) {
    differentiate_pairs<false>(p, t, s, key, n, padded);
  } else {
    differentiate_pairs<true>(p, t, s, key, n, padded);
  }
  add_product(s.weights, s.grad_pairs, n, padded, lanes, s, s.grad_value + key * dims);
  add_product(s.slopes, s.query_pairs, n, padded, lanes, s, s.grad_key + key * dims);
  const uint16_t* keys = base<uint16_t>(p.key, t.b, t.h) + key * p.key.token;
  pack_value_tiles([&](int i) { return i < n ? keys + i * p.key.token : nullptr; }, padded, dims,
                   s.key_pairs);
  turn_slopes(s.slopes, padded, lanes, s.turned);
  multiply_pairs(s.turned, s.key_pairs, lanes, padded, dims, s.grad_query, !first);
}

void write_gradients(const Backward& p, int64_t b, int64_t h, const TileBackwardScratch& s) {
  for (int64_t n = 0; n < p.tokens; ++n) {
    stream_row(s.grad_key + n * s.width, output_row<uint16_t>(p, p.grad_key, b, h, n), s.width);
    stream_row(s.grad_value + n * s.width, output_row<uint16_t>(p, p.grad_value, b, h, n), s.width);
  }
}

void backward_amx(const Backward& p, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  backward_items<TileBackwardScratch>(p, begin, end);
  _tile_release();
  _mm_sfence();  // streamed rows are seen by whoever sees that this is done
}
