// Forward for bf16 on the AMX matrix tiles: the same sweep as block_sparse_attention_forward.h with
// both products on 16 x 16 tiles, 32 rows at a time.
// Included inside namespace svitt::avx512 after that file and amx.h.
//
// Only the weights are rounded to bf16; logits, maximum, sum and accumulation stay in fp32.
// Tried without gain: prefetching tiles to the L1 cache, Q in tile registers throughout, results
// rounded by vectors.

constexpr int kTileColumns = kColumns + kPairs;

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

void TileScratch::stage(const Forward& p, int64_t b, int64_t h) {
  tiling.length = static_cast<int>(p.length(b));
  for (int i = 0; i < tiling.tiles(); ++i) {
    const Tile t = tiling.tile(i);
    pack_key_tiles(TileRows{base<uint16_t>(p.key, b, h), p.key.token, t}, tiling.width, p.head_dim,
                   keys + i * key_tile);
    pack_value_tiles(TileRows{base<uint16_t>(p.value, b, h), p.value.token, t}, tiling.width,
                     p.head_dim, values + i * value_tile);
  }
}

/// Weights exp(x - most) of one row, rounded to bf16; returns the sum of the unrounded weights.
SVITT_INLINE float exponentiate_bf16(const float* s, int columns, float most, uint16_t* weights) {
  vf sum{};
  const vf low = splat(-1.4426950408889634f * most);
  for (int c = 0; c < columns; c += W) {
    const vf e = exp2_bf16(load(s + c) * 1.4426950408889634f + low);
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
      float most[kTileRows];
      for (int r = 0; r < rows; ++r) {
        prefetch_neighbours<bf16>(p, block, r0 + r);
        prefetch_head<bf16>(p, block, r0 + r);
        most[r] = finish_logits(p, block, chunk, *s.bias, table, block.row + r0 + r,
                                s.logits + r * kTileColumns);
      }
      if (r0 == 0) keep_saliency(p, block, chunk, s.logits);
      for (int r = 0; r < rows; ++r) {
        const float keep = advance(most[r], first, s.most + r0 + r, out + r * dims, dims);
        s.sum[r0 + r] =
            s.sum[r0 + r] * keep + exponentiate_bf16(s.logits + r * kTileColumns, chunk.columns,
                                                     s.most[r0 + r], s.weights + r * kTileColumns);
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
