// Forward: for each row block the listed keys are gathered, packed and multiplied, flash-style.
// Included inside namespace svitt::SVITT_ISA after block_sparse_attention_common.h.

constexpr int kLogitStride = kColumns + W;  // not a power of two: rows fall into different cache sets

struct ForwardScratch {
  Arena arena;
  int width;  // head_dim rounded up to W
  float *query, *keys, *values, *logits, *out, *most, *sum;
  int32_t* token;
  BiasColumns* bias;

  template <class P>
  explicit ForwardScratch(const P& p) : width(round_up(p.head_dim, W)) {
    const int64_t rows = p.block_size > p.num_global ? p.block_size : p.num_global;
    query = arena.floats(rows * width);
    keys = arena.floats(static_cast<int64_t>(kColumns) * width);
    values = arena.floats(static_cast<int64_t>(kColumns) * round_up(p.head_dim, kPanel));
    logits = arena.floats(kRows * kLogitStride);
    out = arena.floats(rows * width);
    most = arena.floats(rows);
    sum = arena.floats(rows);
    token = arena.ints(kColumns);
    bias = static_cast<BiasColumns*>(arena.take(sizeof(BiasColumns)));
  }
};

template <class T>
const T* base(const Matrix& m, int64_t b, int64_t h) {
  return static_cast<const T*>(m.data) + b * m.batch + h * m.head;
}

/// Rows of global 0: logits while sweeping, probabilities once the row's log-sum-exp is known.
SVITT_INLINE float* saliency_row(const Forward& p, const RowBlock& block) {
  if (p.saliency == nullptr || !block.global) return nullptr;
  return p.saliency + (block.b * p.heads + block.h) * p.num_tokens();
}

template <class T>
void write_results(const Forward& p, const RowBlock& block, const float* out, int width,
                   const float* most, const float* sum) {
  for (int row = block.row; row < block.end; ++row) {
    const int r = row - block.row;
    const bool some = r < block.rows && sum[r] != 0.0f;
    T* to = static_cast<T*>(p.out) + ((block.b * p.tokens + row) * p.heads + block.h) * p.head_dim;
    float* lse = p.lse + (block.b * p.heads + block.h) * p.tokens + row;
    *lse = some ? most[r] + __builtin_logf(sum[r]) : -kInfinity;
    if (some) {
      write_row(to, out + r * width, p.head_dim, 1.0f / sum[r]);
    } else {
      std::memset(static_cast<void*>(to), 0, sizeof(T) * p.head_dim);
    }
  }
  float* saliency = saliency_row(p, block);
  if (saliency == nullptr) return;
  const int64_t existing = block.length > p.num_global ? block.length - p.num_global : 0;
  const float lse = p.lse[(block.b * p.heads + block.h) * p.tokens];
  for (int64_t i = 0; i < existing; ++i)
    saliency[i] = exp2_nonpositive(splat((saliency[i] - lse) * kLog2e))[0];
  for (int64_t i = existing; i < p.num_tokens(); ++i) saliency[i] = 0.0f;
}

SVITT_INLINE void keep_saliency(const Forward& p, const RowBlock& block, const int32_t* token,
                                const float* logits, int n) {
  float* saliency = saliency_row(p, block);
  if (saliency == nullptr) return;
  for (int i = 0; i < n; ++i)
    if (token[i] >= p.num_global) saliency[token[i] - p.num_global] = logits[i];
}

/// Online softmax of one row of a chunk: logits become weights, and what was accumulated so far is
/// brought to the new maximum.
SVITT_INLINE void soften(float* s, int n, float chunk_most, bool first, float* most, float* sum,
                         float* out, int width) {
  const float now = first || chunk_most > *most ? chunk_most : *most;
  const float total = exponentiate(s, n, now);
  if (first) {
    *sum = total;
  } else {
    const float keep = exp2_nonpositive(splat((*most - now) * kLog2e))[0];
    *sum = *sum * keep + total;
    if (keep != 1.0f)
      for (int d = 0; d < width; d += W) store(out + d, load(out + d) * keep);
  }
  *most = now;
}

template <class T>
void forward_block(const Forward& p, RowBlock& block, ForwardScratch& s) {
  const T* query = base<T>(p.query, block.b, block.h);
  const T* key = base<T>(p.key, block.b, block.h);
  const T* value = base<T>(p.value, block.b, block.h);
  const float* table = p.table == nullptr ? nullptr : p.table + block.h * p.table_stride;
  copy_rows(query + block.row * p.query.token, p.query.token, block.rows, p.head_dim, s.query,
            s.width);
  for (int r = 0; r < block.rows; ++r) s.sum[r] = 0.0f;
  if (table != nullptr && block.rows > 0) s.bias->bind(p, block.b);

  float *logit_rows[kRows], *out_rows[kRows];
  for (int r = 0; r < kRows; ++r) logit_rows[r] = s.logits + r * kLogitStride;
  bool first = true;
  while (block.rows > 0) {
    const int n = block.gather(s.token, kColumns);
    if (n == 0) break;
    pack_columns(Gather<T>{key, p.key.token, s.token, n}, p.head_dim, s.keys);
    pack_rows(Gather<T>{value, p.value.token, s.token, n}, p.head_dim, s.values);
    if (table != nullptr) s.bias->describe(s.token, n);
    for (int r0 = 0; r0 < block.rows; r0 += kRows) {
      const int rows = block.rows - r0 < kRows ? block.rows - r0 : kRows;
      multiply(rows, n, p.head_dim, {s.query + r0 * s.width, s.width, 1}, s.keys, logit_rows,
               false);
      for (int r = 0; r < rows; ++r) {
        float* x = logit_rows[r];
        out_rows[r] = s.out + (r0 + r) * s.width;
        const float most = finish_logits(p, block, *s.bias, table, block.row + r0 + r, x, n);
        if (r0 + r == 0) keep_saliency(p, block, s.token, x, n);
        soften(x, n, most, first, s.most + r0 + r, s.sum + r0 + r, out_rows[r], s.width);
      }
      multiply(rows, p.head_dim, n, {s.logits, kLogitStride, 1}, s.values, out_rows, !first);
    }
    first = false;
  }
  write_results<T>(p, block, s.out, s.width, s.most, s.sum);
}

template <class T>
void forward_items(const Forward& p, int64_t begin, int64_t end) {
  ForwardScratch scratch(p);
  RowBlock block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / p.row_blocks();
    block.start(p, head / p.heads, head % p.heads, item % p.row_blocks());
    forward_block<T>(p, block, scratch);
  }
}

void forward(const Forward& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::f32: return forward_items<float>(p, begin, end);
    case Dtype::bf16: return forward_items<bf16>(p, begin, end);
    case Dtype::f16: return forward_items<fp16>(p, begin, end);
  }
}
