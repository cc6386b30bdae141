// Backward: one sweep over the row blocks of a head, five small products a chunk.
// Included inside namespace svitt::SVITT_ISA after block_sparse_attention_bias.h.
//
// dK and dV of a whole head accumulate in fp32 beside the sweep, in the order of the row blocks, so
// there is nothing to reduce over threads. Weights are recomputed from the forward's log-sum-exp.

constexpr int kRowTile = 64;  // query rows per pass

struct BackwardScratch {
  Arena arena;
  Tiling tiling;
  int width, stride;  // of a row of head_dim, of a row of logits
  int64_t column_tile;
  float *keys, *key_buffer, *values;
  HeadRows key_rows;
  float *query, *grad_out, *weights, *slopes, *delta;
  float *grad_query, *grad_key, *grad_value;
  Chunk* chunk;
  BiasColumns* bias;

  explicit BackwardScratch(const Backward& p)
      : tiling(p, W), width(round_up(p.head_dim, W)), stride(kColumns + W) {
    column_tile = static_cast<int64_t>(round_up(tiling.width, kPanel)) * p.head_dim;
    keys = arena.take<float>(tiling.tiles() * column_tile);
    key_buffer = arena.take<float>(p.tokens * width);
    values = arena.take<float>(tiling.tiles() * column_tile);
    query = arena.take<float>(kRowTile * width);
    grad_out = arena.take<float>(kRowTile * width);
    weights = arena.take<float>(kRowTile * stride);
    slopes = arena.take<float>(kRowTile * stride);
    delta = arena.take<float>(kRowTile);
    grad_query = arena.take<float>(kRowTile * width);
    grad_key = arena.take<float>(p.tokens * width);
    grad_value = arena.take<float>(p.tokens * width);
    chunk = arena.take<Chunk>(1);
    bias = arena.take<BiasColumns>(1);
  }
  template <class T>
  void stage(const Backward& p, int64_t b, int64_t h) {
    tiling.length = static_cast<int>(p.length(b));
    stage_columns<T>(tiling, p.key, b, h, p.head_dim, keys);
    key_rows.stage<T>(p.key, b, h, tiling.length, p.head_dim, key_buffer, width);
    stage_columns<T>(tiling, p.value, b, h, p.head_dim, values);
    std::memset(grad_key, 0, sizeof(float) * p.tokens * width);
    std::memset(grad_value, 0, sizeof(float) * p.tokens * width);
    if (p.table != nullptr) bias->bind(p, b);
  }
};

template <class T>
SVITT_INLINE void write_head(const Backward& p, void* output, int64_t b, int64_t h,
                             const float* rows, int width) {
  constexpr int64_t kAhead = 16;
  for (int64_t n = 0; n < p.tokens; ++n) {
    if (n + kAhead < p.tokens)
      prefetch_row<true>(output_row<T>(p, output, b, h, n + kAhead), p.head_dim);
    write_row(output_row<T>(p, output, b, h, n), rows + n * width, p.head_dim, 1.0f);
  }
}

template <class T>
SVITT_INLINE void load_rows(const Matrix& m, const RowBlock& block, int row, int rows, int dims,
                            float* to, int width) {
  copy_rows(base<T>(m, block.b, block.h) + row * m.token, m.token, rows, dims, to, width);
}

/// Weights from dot products, then the logits' gradient from the weights' gradient, one row.
SVITT_INLINE void differentiate_row(const Backward& p, const RowBlock& block,
                                    const BackwardScratch& s, const float* table,
                                    float* grad_table, int row, float lse, float delta,
                                    float* weights, float* slopes) {
  const Chunk& chunk = *s.chunk;
  finish_logits(p, block, chunk, *s.bias, table, row, weights);
  exponentiate(weights, chunk.columns, lse);
  const int32_t code = table != nullptr && !block.global ? s.bias->row_code(row) : 0;
  for (int c = 0; c < chunk.columns; c += W) {
    vf slope = load(weights + c) * (load(slopes + c) - splat(delta));
    if (grad_table != nullptr) {
      slope = load(chunk.mask + c) == 0.0f ? slope : vf{};
      if (block.global) {
        s.bias->add_global_row(grad_table, row, c / W, slope);
      } else {
        s.bias->add_token_row(grad_table, code, c / W, slope);
      }
    }
    store(slopes + c, slope * splat(p.scale));
  }
}

/// Rows r0 to r0 + count of A times the transposed tiles of a chunk.
SVITT_INLINE void multiply_by_tiles(const Backward& p, const BackwardScratch& s, int r0, int count,
                                    const float* a, const float* tiles, float* c) {
  for (int i = 0; i < s.chunk->entries; ++i) {
    const Entry& e = s.chunk->entry[i];
    float* to[kRows];
    for (int r = 0; r < count; ++r) to[r] = c + (r0 + r) * s.stride + e.column;
    const Segment part{a + r0 * s.width, tiles + e.tile * s.column_tile, kPanel,
                       static_cast<int64_t>(p.head_dim) * kPanel, p.head_dim};
    multiply(count, s.tiling.width, &part, 1, {s.width, 1}, to, false);
  }
}

template <class T>
void backward_tile(const Backward& p, RowBlock& block, int row, int rows, BackwardScratch& s,
                   float* grad_table) {
  const float* table = p.table == nullptr ? nullptr : p.table + block.h * p.table_stride;
  const float* lse = p.lse + (block.b * p.heads + block.h) * p.tokens + row;
  load_rows<T>(p.query, block, row, rows, p.head_dim, s.query, s.width);
  load_rows<T>(p.grad_out, block, row, rows, p.head_dim, s.grad_out, s.width);
  const T* out = base<T>(p.out, block.b, block.h) + row * p.out.token;
  for (int r = 0; r < rows; ++r) {
    vf sum{};
    for (int d = 0; d < p.head_dim; d += W)
      sum += load(s.grad_out + r * s.width + d) *
             load_some(out + r * p.out.token + d, p.head_dim - d);
    s.delta[r] = hsum(sum);
  }

  float *query_rows[kRowTile];
  for (int r = 0; r < rows; ++r) query_rows[r] = s.grad_query + r * s.width;
  const Chunk& chunk = *s.chunk;
  Segment by_keys[kSegments];
  bool first = true;
  for (block.rewind(s.tiling); block.gather(s.tiling, *s.chunk); first = false) {
    if (table != nullptr) s.bias->describe(chunk);
    const int groups = (rows + kRows - 1) / kRows;
    for (int g = 0; g < groups; ++g) {
      const int r0 = rows * g / groups, count = rows * (g + 1) / groups - r0;
      multiply_by_tiles(p, s, r0, count, s.query, s.keys, s.weights);
      multiply_by_tiles(p, s, r0, count, s.grad_out, s.values, s.slopes);
      for (int r = r0; r < r0 + count; ++r) {
        prefetch_row<true>(output_row<T>(p, p.grad_query, block.b, block.h, row + r), p.head_dim);
        differentiate_row(p, block, s, table, grad_table, row + r, lse[r], s.delta[r],
                          s.weights + r * s.stride, s.slopes + r * s.stride);
      }
    }
    for (int i = 0; i < chunk.entries; ++i) {
      const Entry& e = chunk.entry[i];
      float *key_rows[kColumns], *value_rows[kColumns];
      const int count = e.to - e.from, column = e.column + e.from;
      for (int j = 0; j < count; ++j) {
        const int64_t token = chunk.token[column + j];
        key_rows[j] = s.grad_key + token * s.width;
        value_rows[j] = s.grad_value + token * s.width;
      }
      const Segment by_weights{s.weights + column, s.grad_out, s.width, kPanel, rows};
      multiply(count, p.head_dim, &by_weights, 1, {1, s.stride}, value_rows, true);
      const Segment by_slopes{s.slopes + column, s.query, s.width, kPanel, rows};
      multiply(count, p.head_dim, &by_slopes, 1, {1, s.stride}, key_rows, true);
    }
    const int segments = column_segments(chunk, s.tiling, s.slopes, s.key_rows, by_keys);
    multiply(rows, p.head_dim, by_keys, segments, {s.stride, 1}, query_rows, !first);
  }
  if (first) std::memset(s.grad_query, 0, sizeof(float) * rows * s.width);
  for (int r = 0; r < rows; ++r)
    write_row(output_row<T>(p, p.grad_query, block.b, block.h, row + r), query_rows[r], p.head_dim,
              1.0f);
}

template <class T>
void backward_items(const Backward& p, int64_t begin, int64_t end) {
  BackwardScratch s(p);
  RowBlock block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.heads, h = item % p.heads;
    s.stage<T>(p, b, h);
    float* grad_table = p.grad_table == nullptr ? nullptr : p.grad_table + item * p.table_stride;
    for (int64_t i = 0; i < p.row_blocks(); ++i) {
      block.start(p, s.tiling, b, h, i);
      for (int r = 0; r < block.rows; r += kRowTile)
        backward_tile<T>(p, block, block.row + r,
                         block.rows - r < kRowTile ? block.rows - r : kRowTile, s, grad_table);
      for (int64_t row = block.row + block.rows; row < block.end; ++row)
        std::memset(static_cast<void*>(output_row<T>(p, p.grad_query, b, h, row)), 0,
                    sizeof(T) * p.head_dim);
    }
    write_head<T>(p, p.grad_key, b, h, s.grad_key, s.width);
    write_head<T>(p, p.grad_value, b, h, s.grad_value, s.width);
  }
}

void backward(const Backward& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::f32: return backward_items<float>(p, begin, end);
    case Dtype::bf16: return backward_items<bf16>(p, begin, end);
    case Dtype::f16: return backward_items<fp16>(p, begin, end);
  }
}
