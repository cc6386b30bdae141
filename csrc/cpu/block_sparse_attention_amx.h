// Forward for bf16 on the AMX matrix tiles: the same sweep as block_sparse_attention_forward.h with
// both products on 16 x 16 tiles, 32 rows at a time.
// Included inside namespace svitt::avx512 after that file, with amx-tile, amx-bf16, avx512bf16
// enabled.
//
// A tile multiplication takes A as rows of 32 bf16 and B as 16 rows of 16 pairs: for Q K^T a pair
// is two neighbouring dims of one key, for P V one dim of two neighbouring keys. Only the weights
// are rounded to bf16; logits, maximum, sum and accumulation stay in fp32.

constexpr int kTile = 16;
constexpr int kPairs = 32;  // bf16 values a tile row holds
constexpr int kTileRows = 2 * kTile;
constexpr int kTileColumns = kColumns + kPairs;

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct TileScratch : RowScratch {
  Tiling tiling;
  int64_t key_tile, value_tile;
  uint16_t *query, *keys, *values, *weights;
  float *logits, *out;

  explicit TileScratch(const Forward& p) : RowScratch(p), tiling(p, kPairs) {
    const int64_t padded = round_up(static_cast<int>(rows), kTileRows);
    key_tile = value_tile = static_cast<int64_t>(tiling.width) * p.head_dim;
    keys = arena.take<uint16_t>(tiling.tiles() * key_tile);
    values = arena.take<uint16_t>(tiling.tiles() * value_tile);
    query = arena.take<uint16_t>(padded * p.head_dim);
    weights = arena.take<uint16_t>(kTileRows * kTileColumns);
    logits = arena.take<float>(kTileRows * kTileColumns);
    out = arena.take<float>(padded * p.head_dim);
  }
  void stage(const Forward& p, int64_t b, int64_t h);
};

/// Rows of a tile: its tokens, its globals, then nothing.
struct TileRows {
  const uint16_t* data;
  int64_t stride;
  Tile tile;

  const uint16_t* operator()(int i) const {
    if (i < tile.tokens) return data + (tile.first + i) * stride;
    i -= tile.tokens;
    return i < tile.globals ? data + (tile.first_global + i) * stride : nullptr;
  }
};

/// B tiles of Q K^T: tile (key group, dim group) holds pair row k, column n = key n, dims 2k, 2k
/// + 1.
SVITT_INLINE void pack_key_tiles(const TileRows& rows, int columns, int dims, uint16_t* packed) {
  for (int i = 0; i < columns; i += kTile)
    for (int d = 0; d < dims; d += kPairs, packed += kTile * kPairs) {
      vf pairs[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        const uint16_t* row = rows(i + r);
        pairs[r] = row == nullptr ? vf{} : load_as<vf>(row + d);
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) std::memcpy(packed + r * kPairs, &pairs[r], 64);
    }
}

/// 32 values of a row, or zeros where there is none.
SVITT_INLINE __m512i load_pairs(const uint16_t* row, int d) {
  return row == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(row + d);
}

/// B tiles of P V: tile (key group of 32, dim group of 16) holds pair row k = keys 2k, 2k + 1.
SVITT_INLINE void pack_value_tiles(const TileRows& rows, int columns, int dims, uint16_t* packed) {
  alignas(64) uint16_t interleave[2][32];
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 32; ++i)
      interleave[half][i] = static_cast<uint16_t>(16 * half + i / 2 + 32 * (i % 2));
  const __m512i low = _mm512_load_si512(interleave[0]), high = _mm512_load_si512(interleave[1]);
  const int64_t tile = kTile * kPairs;
  for (int i = 0; i < columns; i += 2) {
    const uint16_t *even = rows(i), *odd = rows(i + 1);
    uint16_t* to = packed + (i / kPairs) * (dims / kTile) * tile + (i % kPairs) / 2 * kPairs;
    for (int d = 0; d < dims; d += kPairs, to += 2 * tile) {
      _mm512_storeu_si512(to,
                          _mm512_permutex2var_epi16(load_pairs(even, d), low, load_pairs(odd, d)));
      _mm512_storeu_si512(to + tile,
                          _mm512_permutex2var_epi16(load_pairs(even, d), high, load_pairs(odd, d)));
    }
  }
}

void TileScratch::stage(const Forward& p, int64_t b, int64_t h) {
  tiling.length = static_cast<int>(p.length(b));
  for (int i = 0; i < tiling.tiles(); ++i) {
    const Tile t = tiling.tile(i);
    pack_key_tiles({base<uint16_t>(p.key, b, h), p.key.token, t}, tiling.width, p.head_dim,
                   keys + i * key_tile);
    pack_value_tiles({base<uint16_t>(p.value, b, h), p.value.token, t}, tiling.width, p.head_dim,
                     values + i * value_tile);
  }
}

/// The 32 x 32 block of C in the tile registers; A is 32 rows, B two tiles side by side, `b_next`
/// apart.
SVITT_INLINE void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
SVITT_INLINE void load_tiles(const float* c, int64_t stride) {
  const float* low = c + kTile * stride;
  _tile_loadd(0, c, 4 * stride);
  _tile_loadd(1, c + kTile, 4 * stride);
  _tile_loadd(2, low, 4 * stride);
  _tile_loadd(3, low + kTile, 4 * stride);
}
SVITT_INLINE void store_tiles(float* c, int64_t stride) {
  float* low = c + kTile * stride;
  _tile_stored(0, c, 4 * stride);
  _tile_stored(1, c + kTile, 4 * stride);
  _tile_stored(2, low, 4 * stride);
  _tile_stored(3, low + kTile, 4 * stride);
}
SVITT_INLINE void multiply_tiles(int steps, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                                 int64_t b_step, int64_t b_next) {
  for (int k = 0; k < steps; ++k, a += kPairs, b += b_step) {
    _tile_loadd(4, a, 2 * a_stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(5, a + kTile * a_stride, 2 * a_stride);
    _tile_loadd(7, b + b_next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

/// exp(x - most) to 3e-6 with the processor's own range reduction; -inf gives 0.
SVITT_INLINE vf exp_bf16(vf x, vf low) {
  constexpr int kFloor = 1;
  const __m512 t = reinterpret_cast<__m512>(x * 1.4426950408889634f + low);
  const vf f = reinterpret_cast<vf>(_mm512_maskz_reduce_ps(0xffff, t, kFloor));  // t - floor(t)
  vf p = splat(0.013534166850149632f) * f + 0.05201146379113197f;
  p = p * f + 0.2414427548646927f;
  p = p * f + 0.6930038332939148f;
  p = p * f + 1.0000026226043701f;
  return reinterpret_cast<vf>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), t));
}

/// Weights exp(x - most) of one row, rounded to bf16; returns the sum of the unrounded weights.
SVITT_INLINE float exponentiate_bf16(const float* s, int columns, float most, uint16_t* weights) {
  vf sum{};
  const vf low = splat(-1.4426950408889634f * most);
  for (int c = 0; c < columns; c += W) {
    const vf e = exp_bf16(load(s + c), low);
    const auto rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(e));
    std::memcpy(weights + c, &rounded, 32);
    sum += e;
  }
  return hsum(sum);
}

void forward_block_amx(const Forward& p, RowBlock& block, TileScratch& s) {
  const int dims = p.head_dim;
  const float* table = p.table == nullptr ? nullptr : p.table + block.h * p.table_stride;
  Chunk& chunk = *s.chunk;
  const auto* query = base<uint16_t>(p.query, block.b, block.h);
  for (int r = 0; r < round_up(block.rows, kTileRows); ++r) {
    uint16_t* to = s.query + static_cast<int64_t>(r) * dims;
    if (r < block.rows) {
      std::memcpy(to, query + (block.row + r) * p.query.token, 2 * dims);
    } else {
      std::memset(to, 0, 2 * dims);
    }
  }
  for (int r = 0; r < block.rows; ++r) s.sum[r] = 0.0f;
  if (table != nullptr && block.rows > 0) s.bias->bind(p, block.b);

  const int64_t tile = kTile * kPairs, key_group = dims / kPairs * tile;
  for (bool first = true; block.rows > 0 && block.gather(s.tiling, chunk); first = false) {
    if (table != nullptr) s.bias->describe(chunk);
    for (int r0 = 0; r0 < block.rows; r0 += kTileRows) {
      const int rows = block.rows - r0 < kTileRows ? block.rows - r0 : kTileRows;
      const uint16_t* q = s.query + static_cast<int64_t>(r0) * dims;
      float* out = s.out + static_cast<int64_t>(r0) * dims;
      for (int i = 0; i < chunk.entries; ++i)
        for (int j = 0; j < s.tiling.width; j += kPairs) {
          const Entry& e = chunk.entry[i];
          clear_tiles();
          multiply_tiles(dims / kPairs, q, dims,
                         s.keys + e.tile * s.key_tile + j / kTile * key_group, tile, key_group);
          store_tiles(s.logits + e.column + j, kTileColumns);
        }
      for (int r = 0; r < rows; ++r) {
        float* x = s.logits + r * kTileColumns;
        const float most = finish_logits(p, block, chunk, *s.bias, table, block.row + r0 + r, x);
        if (r0 + r == 0) keep_saliency(p, block, chunk, x);
        const float keep = advance(most, first, s.most + r0 + r, out + r * dims, dims);
        s.sum[r0 + r] = s.sum[r0 + r] * keep + exponentiate_bf16(x, chunk.columns, s.most[r0 + r],
                                                                 s.weights + r * kTileColumns);
      }
      for (int d = 0; d < dims; d += kPairs) {
        if (first) {
          clear_tiles();
        } else {
          load_tiles(out + d, dims);
        }
        for (int i = 0; i < chunk.entries; ++i) {
          const Entry& e = chunk.entry[i];
          multiply_tiles(s.tiling.width / kPairs, s.weights + e.column, kTileColumns,
                         s.values + e.tile * s.value_tile + d / kTile * tile, dims / kTile * tile,
                         tile);
        }
        store_tiles(out + d, dims);
      }
    }
  }
  write_results<bf16>(p, block, s.tiling.length, s.out, dims, s);
}

void forward_amx(const Forward& p, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  {
    TileScratch scratch(p);
    RowBlock block;
    int64_t staged = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / p.row_blocks(), b = head / p.heads, h = head % p.heads;
      if (head != staged) scratch.stage(p, b, h);
      staged = head;
      block.start(p, scratch.tiling.length, b, h, item % p.row_blocks());
      block.rewind(scratch.tiling);
      forward_block_amx(p, block, scratch);
    }
  }
  _tile_release();
}
