// Forward for bf16 on the AMX matrix tiles: the same sweep as block_sparse_attention_forward.h with
// both products on 16 x 16 tiles, 32 rows at a time.
// Included inside namespace svitt::avx512 after that file, with amx-tile, amx-bf16, avx512bf16 enabled.
//
// A tile multiplication takes A as rows of 32 bf16 and B as 16 rows of 16 pairs: for Q K^T a pair is two
// neighbouring dims of one key, for P V one dim of two neighbouring keys. Only the weights are
// rounded to bf16; logits, maximum, sum and accumulation stay in fp32.

constexpr int kTile = 16;
constexpr int kPairs = 32;  // bf16 values a tile row holds
constexpr int kTileRows = 2 * kTile;
constexpr int kTileColumns = kColumns + kPairs;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct TileScratch {
  Arena arena;
  uint16_t *query, *keys, *values, *weights;
  float *logits, *out, *most, *sum;
  int32_t* token;
  BiasColumns* bias;

  explicit TileScratch(const Forward& p) {
    const int64_t most_rows = p.block_size > p.num_global ? p.block_size : p.num_global;
    const int64_t rows = (most_rows + kTileRows - 1) / kTileRows * kTileRows;
    const auto half = [this](int64_t n) { return static_cast<uint16_t*>(arena.take(2 * n)); };
    query = half(rows * p.head_dim);
    keys = half(static_cast<int64_t>(kTileColumns) * p.head_dim);
    values = half(static_cast<int64_t>(kTileColumns) * p.head_dim);
    weights = half(kTileRows * kTileColumns);
    logits = arena.floats(kTileRows * kTileColumns);
    out = arena.floats(rows * p.head_dim);
    most = arena.floats(rows);
    sum = arena.floats(rows);
    token = arena.ints(kColumns);
    bias = static_cast<BiasColumns*>(arena.take(sizeof(BiasColumns)));
  }
};

/// B tiles of Q K^T: tile (key group, dim group) holds pair row k, column n = key n, dims 2k, 2k + 1.
SVITT_INLINE void pack_key_tiles(Gather<uint16_t> rows, int columns, int dims, uint16_t* packed) {
  for (int i = 0; i < columns; i += kTile)
    for (int d = 0; d < dims; d += kPairs, packed += kTile * kPairs) {
      vf pairs[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        pairs[r] = i + r < rows.count
                       ? load_as<vf>(rows.data + rows.token[i + r] * rows.stride + d)
                       : vf{};
      transpose(pairs);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) std::memcpy(packed + r * kPairs, &pairs[r], 64);
    }
}

/// B tiles of P V: tile (key group of 32, dim group of 16) holds pair row k = keys 2k, 2k + 1.
SVITT_INLINE void pack_value_tiles(Gather<uint16_t> rows, int columns, int dims,
                                   uint16_t* packed) {
  const auto row = [&](int i, int d) {
    return i < rows.count ? _mm512_loadu_si512(rows.data + rows.token[i] * rows.stride + d)
                          : _mm512_setzero_si512();
  };
  __m512i low, high;
  {
    alignas(64) uint16_t a[32], b[32];
    for (int i = 0; i < 16; ++i) {
      a[2 * i] = static_cast<uint16_t>(i), a[2 * i + 1] = static_cast<uint16_t>(32 + i);
      b[2 * i] = static_cast<uint16_t>(16 + i), b[2 * i + 1] = static_cast<uint16_t>(48 + i);
    }
    low = _mm512_load_si512(a), high = _mm512_load_si512(b);
  }
  const int64_t tile = kTile * kPairs;
  for (int i = 0; i < columns; i += 2) {
    uint16_t* to = packed + (i / kPairs) * (dims / kTile) * tile + (i % kPairs) / 2 * kPairs;
    for (int d = 0; d < dims; d += kPairs, to += 2 * tile) {
      const __m512i even = row(i, d), odd = row(i + 1, d);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + tile, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

/// C (32 x 32) = or += A (32 x 32 depth) B; `b_step` and `b_next` lead along depth and to the second column tile.
SVITT_INLINE void multiply_tiles(int steps, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                                 int64_t b_step, int64_t b_next, bool wide, float* c,
                                 int64_t c_stride, bool add) {
  const int64_t a_bytes = 2 * a_stride, c_bytes = 4 * c_stride;
  const uint16_t* a_low = a + kTile * a_stride;
  float* c_low = c + kTile * c_stride;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(2, c_low, c_bytes);
    if (wide) {
      _tile_loadd(1, c + kTile, c_bytes);
      _tile_loadd(3, c_low + kTile, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < steps; ++k, b += b_step) {
    _tile_loadd(4, a + k * kPairs, a_bytes);
    _tile_loadd(5, a_low + k * kPairs, a_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (wide) {
      _tile_loadd(7, b + b_next, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(2, c_low, c_bytes);
  if (wide) {
    _tile_stored(1, c + kTile, c_bytes);
    _tile_stored(3, c_low + kTile, c_bytes);
  }
}

/// Weights exp(x - most) of one row, rounded to bf16; returns the sum of the unrounded weights.
SVITT_INLINE float exponentiate_bf16(const float* s, int n, int padded, float most,
                                     uint16_t* weights) {
  vf sum{};
  const vf m = splat(most);
  for (int j = 0; j < padded; j += W) {
    vf e{};
    if (j < n) e = exp2_nonpositive((load(s + j) - m) * kLog2e);
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(e)));
    std::memcpy(weights + j, &rounded, 32);
    sum += e;
  }
  return hsum(sum);
}

void forward_block_amx(const Forward& p, RowBlock& block, TileScratch& s) {
  const int dims = p.head_dim;
  const auto* query = base<uint16_t>(p.query, block.b, block.h);
  const auto* key = base<uint16_t>(p.key, block.b, block.h);
  const auto* value = base<uint16_t>(p.value, block.b, block.h);
  const float* table = p.table == nullptr ? nullptr : p.table + block.h * p.table_stride;
  for (int r = 0; r < round_up(block.rows, kTileRows); ++r) {
    uint16_t* to = s.query + static_cast<int64_t>(r) * dims;
    if (r < block.rows) std::memcpy(to, query + (block.row + r) * p.query.token, 2 * dims);
    else std::memset(to, 0, 2 * dims);
  }
  for (int r = 0; r < block.rows; ++r) s.sum[r] = 0.0f;
  if (table != nullptr && block.rows > 0) s.bias->bind(p, block.b);

  const int64_t tile = kTile * kPairs;
  bool first = true;
  while (block.rows > 0) {
    const int n = block.gather(s.token, kColumns);
    if (n == 0) break;
    const int tiles = round_up(n, kTile), padded = round_up(n, kPairs);
    pack_key_tiles({key, p.key.token, s.token, n}, tiles, dims, s.keys);
    pack_value_tiles({value, p.value.token, s.token, n}, padded, dims, s.values);
    if (table != nullptr) s.bias->describe(s.token, n);
    for (int r0 = 0; r0 < block.rows; r0 += kTileRows) {
      const int rows = block.rows - r0 < kTileRows ? block.rows - r0 : kTileRows;
      const int64_t key_group = dims / kPairs * tile;
      for (int j = 0; j < tiles; j += 2 * kTile)
        multiply_tiles(dims / kPairs, s.query + static_cast<int64_t>(r0) * dims, dims,
                       s.keys + j / kTile * key_group, tile, key_group, tiles - j > kTile,
                       s.logits + j, kTileColumns, false);
      float* out = s.out + static_cast<int64_t>(r0) * dims;
      for (int r = 0; r < rows; ++r) {
        float* x = s.logits + r * kTileColumns;
        const float most = finish_logits(p, block, *s.bias, table, block.row + r0 + r, x, n);
        if (r0 + r == 0) keep_saliency(p, block, s.token, x, n);
        const float before = s.most[r0 + r], now = first || most > before ? most : before;
        const float total = exponentiate_bf16(x, n, padded, now, s.weights + r * kTileColumns);
        const float keep = first ? 0.0f : exp2_nonpositive(splat((before - now) * kLog2e))[0];
        if (!first && keep != 1.0f)
          for (int d = 0; d < dims; d += W)
            store(out + r * dims + d, load(out + r * dims + d) * keep);
        s.sum[r0 + r] = first ? total : s.sum[r0 + r] * keep + total;
        s.most[r0 + r] = now;
      }
      for (int d = 0; d < dims; d += kPairs)
        multiply_tiles(padded / kPairs, s.weights, kTileColumns, s.values + d / kTile * tile,
                       dims / kTile * tile, tile, true, out + d, dims, !first);
    }
    first = false;
  }
  write_results<bf16>(p, block, s.out, dims, s.most, s.sum);
}

void forward_amx(const Forward& p, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  {
    TileScratch scratch(p);
    RowBlock block;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p.row_blocks();
      block.start(p, head / p.heads, head % p.heads, item % p.row_blocks());
      forward_block_amx(p, block, scratch);
    }
  }
  _tile_release();
}
