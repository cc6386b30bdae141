// Backward: one sweep over the row blocks of a head, five small products for each block of keys.
//
// Everything is held transposed, keys by queries: then K and V are read where they lie, the softmax
// needs no reduction over lanes, and the weights of one block of keys stay in the L1 cache through
// all five products. dK and dV of a whole head accumulate in fp32 beside the sweep, in the order of
// the row blocks, so there is nothing to reduce over threads. Weights come from the forward's
// log-sum-exp.
#pragma once

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "bias.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

constexpr int kRowTile = 64;  // query rows per pass
constexpr int kKeyTile = 64;  // keys per pass, at most

template <class T>
struct BackwardScratch {
  using Value = T;
  static constexpr int kKeys = kKeyTile;  // per pass
  static constexpr bool kMerges = false;  // whether globals ride on a block of keys
  Arena arena;
  int width;  // head_dim rounded up to W
  HeadRows keys, values;
  float *key_buffer, *value_buffer, *grad_key, *grad_value;
  float *query, *query_columns, *grad_out, *grad_columns, *grad_query;
  float *weights, *slopes;  // (keys, kRowTile)
  float *lse, *lse_low, *delta;
  LaneCodes* lanes;

  explicit BackwardScratch(const Backward& p) : width(round_up(p.head_dim, W)) {
    const int64_t columns = static_cast<int64_t>(kRowTile) * p.head_dim;
    arena.take_all(p.tokens * width, key_buffer, value_buffer, grad_key, grad_value);
    query = arena.take<float>(kRowTile * width);
    query_columns = arena.take<float>(columns);
    grad_out = arena.take<float>(kRowTile * width);
    grad_columns = arena.take<float>(columns);
    grad_query = arena.take<float>(kRowTile * width);
    arena.take_all(kKeyTile * kRowTile, weights, slopes);
    arena.take_all(kRowTile, lse, lse_low, delta);
    lanes = arena.take<LaneCodes>(kRowTile / W);
  }
  void stage(const Backward& p, int64_t b, int64_t h) {
    const int64_t length = p.length(b);
    keys.stage<T>(p.key, b, h, length, p.head_dim, key_buffer, width);
    values.stage<T>(p.value, b, h, length, p.head_dim, value_buffer, width);
    std::memset(grad_key, 0, sizeof(float) * p.tokens * width);
    std::memset(grad_value, 0, sizeof(float) * p.tokens * width);
  }
};

/// Up to kRowTile query rows of a row block, and where their bias comes from.
struct RowTile {
  int64_t b, h;
  int row, rows;
  int columns;  // rows rounded up to W
  bool global;
  const float* table;
  float* grad_table;
  const int32_t* codes;
};

template <class T>
void write_head(const Backward& p, void* output, int64_t b, int64_t h, const float* rows,
                int width) {
  constexpr int64_t kAhead = 16;
  for (int64_t n = 0; n < p.tokens; ++n) {
    if (n + kAhead < p.tokens)
      prefetch_row<true>(result_row<T>(p, output, p.tokens, b, h, n + kAhead), p.head_dim);
    write_row(result_row<T>(p, output, p.tokens, b, h, n), rows + n * width, p.head_dim, 1.0f);
  }
}

/// Log-sum-exp of a tile, in two floats, and the codes of its bias.
template <class Scratch>
void describe_rows(const Backward& p, const RowTile& t, Scratch& s) {
  split_sums<kRowTile>(p.lse + (t.b * p.heads + t.h) * p.tokens + t.row, t.rows, s.lse, s.lse_low);
  if (t.table == nullptr || t.global) return;
  for (int r = 0; r < t.rows; r += W) {
    int32_t token[W];
    for (int i = 0; i < W; ++i) token[i] = r + i < t.rows ? t.row + r + i : -1;
    s.lanes[r / W].describe(token, p.num_global, t.codes);
  }
}

template <class T>
void write_gradients(const Backward& p, int64_t b, int64_t h, const BackwardScratch<T>& s) {
  write_head<T>(p, p.grad_key, b, h, s.grad_key, s.width);
  write_head<T>(p, p.grad_value, b, h, s.grad_value, s.width);
}

/// Queries, upstream gradient, log-sum-exp and delta of a tile.
template <class T>
void load_tile(const Backward& p, const RowTile& t, BackwardScratch<T>& s) {
  const auto load_rows = [&](const Matrix& m, float* rows, float* columns) {
    copy_rows(base<T>(m, t.b, t.h) + t.row * m.token, m.token, t.rows, p.head_dim, rows, s.width);
    pack_columns(rows, s.width, t.rows, p.head_dim, columns, t.columns);
  };
  load_rows(p.grad_out, s.grad_out, s.grad_columns);
  load_rows(p.out, s.query, s.query_columns);
  sum_products(s.query_columns, s.grad_columns, t.columns, p.head_dim, s.delta);
  load_rows(p.query, s.query, s.query_columns);
  describe_rows(p, t, s);
}

/// The bias of query lanes [c, c + W) against one key, or with `Add` the gradient into the table.
template <bool Add>
SVITT_INLINE vf bias_of_key(const Backward& p, const RowTile& t, const LaneCodes* lanes, int key,
                            int c, vf grad) {
  const int g = p.num_global;
  const bool global_key = key < g;
  if (!t.global && !global_key) {
    const int64_t at = p.centre() - t.codes[key - g];
    if constexpr (Add) lanes[c / W].add(t.grad_table + at, grad);
    return Add ? vf{} : lanes[c / W].look_up(t.table + at);
  }
  vf bias{};
  for (int i = 0; i < W && c + i < t.rows; ++i) {
    const int64_t query = t.row + c + i;
    const int64_t at = p.extra() + (!t.global     ? g + key
                                    : !global_key ? query
                                                  : 2 * g + query * g + key);
    if constexpr (Add)
      t.grad_table[at] += grad[i];
    else
      bias[i] = t.table[at];
  }
  return bias;
}

/// In place: dot products to weights, gradients of weights to scaled gradients of logits.
template <class T>
SVITT_INLINE void differentiate(const Backward& p, const RowTile& t, BackwardScratch<T>& s, int key,
                                int keys) {
  const vf scale = splat(p.scale);
  for (int j = 0; j < keys; ++j) {
    float *weights = s.weights + j * kRowTile, *slopes = s.slopes + j * kRowTile;
    for (int c = 0; c < t.columns; c += W) {
      vf x = load(weights + c) * scale;
      if (t.table != nullptr) x += bias_of_key<false>(p, t, s.lanes, key + j, c, vf{});
      const vf weight = exp_nonpositive(x - load(s.lse + c) - load(s.lse_low + c));
      const vf slope = weight * (load(slopes + c) - load(s.delta + c));
      if (t.table != nullptr) bias_of_key<true>(p, t, s.lanes, key + j, c, slope);
      store(weights + c, weight);
      store(slopes + c, slope * scale);
    }
  }
}

/// All products of a row tile with keys [key, key + keys).
template <class T>
SVITT_INLINE void backward_keys(const Backward& p, const RowTile& t, BackwardScratch<T>& s, int key,
                                int keys, int, bool first) {
  float *weight_rows[kKeyTile], *slope_rows[kKeyTile], *key_rows[kKeyTile], *value_rows[kKeyTile];
  for (int j = 0; j < keys; ++j) {
    weight_rows[j] = s.weights + j * kRowTile;
    slope_rows[j] = s.slopes + j * kRowTile;
    key_rows[j] = s.grad_key + static_cast<int64_t>(key + j) * s.width;
    value_rows[j] = s.grad_value + static_cast<int64_t>(key + j) * s.width;
  }
  float* query_rows[kRowTile];
  for (int r = 0; r < t.rows; ++r) query_rows[r] = s.grad_query + r * s.width;
  const float* k = s.keys.data + key * s.keys.step;
  const float* v = s.values.data + key * s.values.step;
  const int64_t panel = static_cast<int64_t>(p.head_dim) * kPanel;

  const Segment dots{k, s.query_columns, kPanel, panel, p.head_dim};
  multiply(keys, t.columns, &dots, 1, {s.keys.step, 1}, weight_rows, false);
  const Segment grads{v, s.grad_columns, kPanel, panel, p.head_dim};
  multiply(keys, t.columns, &grads, 1, {s.values.step, 1}, slope_rows, false);
  differentiate(p, t, s, key, keys);
  const Segment to_values{s.weights, s.grad_out, s.width, kPanel, t.rows};
  multiply(keys, p.head_dim, &to_values, 1, {kRowTile, 1}, value_rows, true);
  const Segment to_keys{s.slopes, s.query, s.width, kPanel, t.rows};
  multiply(keys, p.head_dim, &to_keys, 1, {kRowTile, 1}, key_rows, true);
  const Segment to_queries{s.slopes, k, s.keys.step, kPanel, keys};
  multiply(t.rows, p.head_dim, &to_queries, 1, {1, kRowTile}, query_rows, !first);
}

template <class Scratch>
void backward_tile(const Backward& p, const RowBlock& block, const RowTile& t, int64_t length,
                   Scratch& s) {
  using T = typename Scratch::Value;
  load_tile(p, t, s);
  bool first = true;
  const auto keys = [&](int64_t key, int64_t n, int64_t globals) {
    backward_keys(p, t, s, static_cast<int>(key), static_cast<int>(n), static_cast<int>(globals),
                  first);
    first = false;
  };
  int64_t globals = t.global ? 0 : p.num_global < length ? p.num_global : length;
  const auto sweep = [&](int64_t from, int64_t to, bool alone) {
    to = to < length ? to : length;
    for (int64_t key = from; key < to; key += Scratch::kKeys) {
      const int64_t n = to - key < Scratch::kKeys ? to - key : Scratch::kKeys;
      const bool ride = !alone && n + globals <= Scratch::kKeys;
      keys(key, n, ride ? globals : 0);
      if (ride) globals = 0;
    }
  };
  if (t.global) sweep(0, length, true);
  if (!Scratch::kMerges) sweep(0, globals, true), globals = 0;
  for (int i = 0; i < block.listed && !t.global; ++i) {
    const int64_t from = p.num_global + static_cast<int64_t>(block.list[i]) * p.block_size;
    sweep(from, from + p.block_size, false);
  }
  sweep(0, globals, true);
  if (first) std::memset(s.grad_query, 0, sizeof(float) * t.rows * s.width);
  for (int r = 0; r < t.rows; ++r)
    write_row(result_row<T>(p, p.grad_query, p.tokens, t.b, t.h, t.row + r),
              s.grad_query + r * s.width, p.head_dim, 1.0f);
}

/// The heads [begin, end), by `load_tile`, `backward_keys` and `write_gradients` of the scratch.
template <class Scratch>
void backward_items(const Backward& p, int64_t begin, int64_t end) {
  using T = typename Scratch::Value;
  Scratch s(p);
  RowBlock block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.heads, h = item % p.heads, length = p.length(b);
    s.stage(p, b, h);
    RowTile t{b, h, 0, 0, 0, false, nullptr, nullptr, nullptr};
    if (p.table != nullptr) {
      t.table = p.table + h * p.table_stride;
      t.grad_table = p.grad_table + item * p.table_stride;
      t.codes = p.codes + b * p.codes_stride;
    }
    for (int64_t i = 0; i < p.row_blocks(); ++i) {
      block.start(p, length, b, h, i);
      t.global = block.global;
      for (int r = 0; r < block.rows; r += kRowTile) {
        t.row = block.row + r;
        t.rows = block.rows - r < kRowTile ? block.rows - r : kRowTile;
        t.columns = round_up(t.rows, W);
        backward_tile(p, block, t, length, s);
      }
      for (int64_t row = block.row + block.rows; row < block.end; ++row)
        std::memset(static_cast<void*>(result_row<T>(p, p.grad_query, p.tokens, b, h, row)), 0,
                    sizeof(T) * p.head_dim);
    }
    write_gradients(p, b, h, s);
  }
}

inline void backward(const Backward& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { backward_items<BackwardScratch<decltype(x)>>(p, begin, end); });
}

SVITT_KERNELS_END
