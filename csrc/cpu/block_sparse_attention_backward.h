// Backward: one sweep over the row blocks of a head, five small products a chunk.
// Included inside namespace svitt::SVITT_ISA after block_sparse_attention_common.h.
//
// dK and dV of a whole head accumulate in fp32 beside the sweep, in the order of the row blocks, so
// there is nothing to reduce over threads. Weights are recomputed from the forward's log-sum-exp.

struct BackwardScratch {
  Arena arena;
  int width, stride;
  float *query, *query_panels, *grad_out, *grad_panels, *keys, *key_rows, *values;
  float *weights, *slopes, *grad_query, *grad_key, *grad_value, *delta;
  int32_t* token;
  BiasColumns* bias;

  explicit BackwardScratch(const Backward& p)
      : width(round_up(p.head_dim, W)), stride(kColumns + W) {
    const int64_t panels = round_up(p.head_dim, kPanel);
    query = arena.floats(kRowTile * width);
    query_panels = arena.floats(kRowTile * panels);
    grad_out = arena.floats(kRowTile * width);
    grad_panels = arena.floats(kRowTile * panels);
    keys = arena.floats(static_cast<int64_t>(kColumns) * width);
    key_rows = arena.floats(kColumns * panels);
    values = arena.floats(static_cast<int64_t>(kColumns) * width);
    weights = arena.floats(kRowTile * stride);
    slopes = arena.floats(kRowTile * stride);
    grad_query = arena.floats(kRowTile * width);
    grad_key = arena.floats(p.tokens * width);
    grad_value = arena.floats(p.tokens * width);
    delta = arena.floats(kRowTile);
    token = arena.ints(kColumns);
    bias = static_cast<BiasColumns*>(arena.take(sizeof(BiasColumns)));
  }
};

/// Weights from dot products, then the logits' gradient from the weights' gradient, one row.
SVITT_INLINE void differentiate_row(const Backward& p, const RowBlock& block,
                                    const BiasColumns& bias, const float* table, float* grad_table,
                                    int row, float lse, float delta, float* weights, float* slopes,
                                    int n) {
  finish_logits(p, block, bias, table, row, weights, n);
  exponentiate(weights, n, lse);
  const int32_t code =
      table != nullptr && !block.global ? bias.centre - bias.codes[row - p.num_global] : 0;
  for (int j = 0; j * W < n; ++j) {
    vf slope = load(weights + j * W) * (load(slopes + j * W) - splat(delta));
    if ((j + 1) * W > n) slope = lane_numbers() < n - j * W ? slope : vf{};
    if (grad_table != nullptr) {
      if (block.global) {
        bias.add_global_row(grad_table, row, j, slope);
      } else {
        bias.add_token_row(grad_table, code, j, slope);
      }
    }
    store(slopes + j * W, slope * splat(p.scale));
  }
}

template <class T>
void backward_tile(const Backward& p, RowBlock& block, int row, int rows, BackwardScratch& s,
                   float* grad_table) {
  const T* key = base<T>(p.key, block.b, block.h);
  const T* value = base<T>(p.value, block.b, block.h);
  const float* table = p.table == nullptr ? nullptr : p.table + block.h * p.table_stride;
  const float* lse = p.lse + (block.b * p.heads + block.h) * p.tokens + row;
  int32_t* token = s.token;
  for (int r = 0; r < rows; ++r) token[r] = row + r;
  const Gather<T> queries{base<T>(p.query, block.b, block.h), p.query.token, token, rows};
  const Gather<T> grads{base<T>(p.grad_out, block.b, block.h), p.grad_out.token, token, rows};
  pack_rows(queries, p.head_dim, s.query_panels);
  pack_rows(grads, p.head_dim, s.grad_panels);
  copy_rows(queries.data + row * queries.stride, queries.stride, rows, p.head_dim, s.query, s.width);
  copy_rows(grads.data + row * grads.stride, grads.stride, rows, p.head_dim, s.grad_out, s.width);
  const T* out = base<T>(p.out, block.b, block.h) + row * p.out.token;
  for (int r = 0; r < rows; ++r) {
    vf sum{};
    for (int d = 0; d < p.head_dim; d += W)
      sum += load(s.grad_out + r * s.width + d) *
             load_some(out + r * p.out.token + d, p.head_dim - d);
    s.delta[r] = hsum(sum);
  }

  float *weight_rows[kRowTile], *slope_rows[kRowTile], *query_rows[kRowTile];
  float *key_rows[kColumns], *value_rows[kColumns];
  for (int r = 0; r < rows; ++r) {
    weight_rows[r] = s.weights + r * s.stride;
    slope_rows[r] = s.slopes + r * s.stride;
    query_rows[r] = s.grad_query + r * s.width;
  }
  bool first = true;
  block.rewind();
  while (const int n = block.gather(token, kColumns)) {
    const Gather<T> keys{key, p.key.token, token, n};
    pack_columns(keys, p.head_dim, s.keys);
    pack_rows(keys, p.head_dim, s.key_rows);
    pack_columns(Gather<T>{value, p.value.token, token, n}, p.head_dim, s.values);
    if (table != nullptr) s.bias->describe(token, n);
    multiply(rows, n, p.head_dim, {s.query, s.width, 1}, s.keys, weight_rows, false);
    multiply(rows, n, p.head_dim, {s.grad_out, s.width, 1}, s.values, slope_rows, false);
    for (int r = 0; r < rows; ++r)
      differentiate_row(p, block, *s.bias, table, grad_table, row + r, lse[r], s.delta[r],
                        weight_rows[r], slope_rows[r], n);
    for (int i = 0; i < n; ++i) {
      key_rows[i] = s.grad_key + static_cast<int64_t>(token[i]) * s.width;
      value_rows[i] = s.grad_value + static_cast<int64_t>(token[i]) * s.width;
    }
    multiply(n, p.head_dim, rows, {s.weights, 1, s.stride}, s.grad_panels, value_rows, true);
    multiply(n, p.head_dim, rows, {s.slopes, 1, s.stride}, s.query_panels, key_rows, true);
    multiply(rows, p.head_dim, n, {s.slopes, s.stride, 1}, s.key_rows, query_rows, !first);
    first = false;
  }
  if (first) std::memset(s.grad_query, 0, sizeof(float) * rows * s.width);
  T* to = static_cast<T*>(p.grad_query);
  for (int r = 0; r < rows; ++r)
    write_row(to + ((block.b * p.tokens + row + r) * p.heads + block.h) * p.head_dim,
              query_rows[r], p.head_dim, 1.0f);
}

template <class T>
void backward_items(const Backward& p, int64_t begin, int64_t end) {
  BackwardScratch s(p);
  RowBlock block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.heads, h = item % p.heads;
    std::memset(s.grad_key, 0, sizeof(float) * p.tokens * s.width);
    std::memset(s.grad_value, 0, sizeof(float) * p.tokens * s.width);
    float* grad_table = p.grad_table == nullptr ? nullptr : p.grad_table + item * p.table_stride;
    if (p.table != nullptr) s.bias->bind(p, b);
    for (int64_t i = 0; i < p.row_blocks(); ++i) {
      block.start(p, b, h, i);
      for (int r = 0; r < block.rows; r += kRowTile)
        backward_tile<T>(p, block, block.row + r,
                         block.rows - r < kRowTile ? block.rows - r : kRowTile, s, grad_table);
      for (int row = block.row + block.rows; row < block.end; ++row)
        std::memset(static_cast<T*>(p.grad_query) + ((b * p.tokens + row) * p.heads + h) * p.head_dim,
                    0, sizeof(T) * p.head_dim);
    }
    for (int64_t n = 0; n < p.tokens; ++n) {
      const int64_t at = ((b * p.tokens + n) * p.heads + h) * p.head_dim;
      write_row(static_cast<T*>(p.grad_key) + at, s.grad_key + n * s.width, p.head_dim, 1.0f);
      write_row(static_cast<T*>(p.grad_value) + at, s.grad_value + n * s.width, p.head_dim, 1.0f);
    }
  }
}

void backward(const Backward& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::f32: return backward_items<float>(p, begin, end);
    case Dtype::bf16: return backward_items<bf16>(p, begin, end);
    case Dtype::f16: return backward_items<fp16>(p, begin, end);
  }
}
