// Backward: one sweep over the keys, five small products for each tile of keys and of queries.
//
// Transposed as the forward is: K and V are read where they lie, and the weights of a tile stay in
// the L1 cache through all five products. Keys are the outer loop, so that each is read once and
// its gradients, complete when the queries have passed, are written once; the gradient of the
// queries of a head accumulates in fp32. Weights come from the forward's log-sum-exp.
#pragma once

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

struct CrossBackwardScratch {
  Arena arena;
  int width;     // head_dim rounded up to W
  int64_t tile;  // floats of a packed query tile
  float *query, *query_columns, *grad_out, *grad_columns, *grad_query, *lse, *lse_low, *delta;
  float *keys, *values, *grad_key, *grad_value, *weights, *slopes;

  explicit CrossBackwardScratch(const CrossBackward& p) : width(round_up(p.head_dim, W)) {
    tile = static_cast<int64_t>(kQueryTile) * p.head_dim;
    const int64_t tiles = (p.queries + kQueryTile - 1) / kQueryTile, lanes = tiles * kQueryTile;
    arena.take_all(p.queries * width, query, grad_out, grad_query);
    arena.take_all(tiles * tile, query_columns, grad_columns);
    arena.take_all(lanes, lse, lse_low, delta);
    arena.take_all(kKeyTile * width, keys, values, grad_key, grad_value);
    arena.take_all(kKeyTile * kQueryTile, weights, slopes);
  }
};

SVITT_INLINE void load_sums(const CrossBackward& p, const KeyRange& range, int64_t row, int rows,
                            float* high, float* low) {
  const double* lse = p.lse + (range.b * p.heads + range.h) * p.queries + row;
  split_sums<kQueryTile>(lse, rows, high + row, low + row);
}

/// A result is not read here again: written past the caches, where the processor can, its lines
/// need not be fetched first.
SVITT_INLINE void stream_row(const float* from, float* to, int dims) {
  for (int d = 0; d < dims; d += W) {
#if SVITT_LANES == 16
    _mm512_stream_ps(to + d, _mm512_loadu_ps(from + d));
#elif SVITT_LANES == 8
    _mm256_stream_ps(to + d, _mm256_loadu_ps(from + d));
#else
    store(to + d, load(from + d));
#endif
  }
}

/// Streamed rows are seen by whoever sees that this is done.
SVITT_INLINE void end_streams() {
#if SVITT_LANES >= 8
  _mm_sfence();
#endif
}

/// Queries, upstream gradient, log-sum-exp and delta of a tile.
template <class T>
void load_queries(const CrossBackward& p, const KeyRange& range, int64_t row, int rows,
                  CrossBackwardScratch& s) {
  const int64_t b = range.b, h = range.h;
  float* query = s.query_columns + row / kQueryTile * s.tile;
  float* grad = s.grad_columns + row / kQueryTile * s.tile;
  pack_queries<T>(p, p.grad_out, b, h, row, rows, grad);
  pack_queries<T>(p, p.out, b, h, row, rows, query);
  sum_products(query, grad, round_up(rows, W), p.head_dim, s.delta + row);
  pack_queries<T>(p, p.query, b, h, row, rows, query);
  copy_rows(base<T>(p.query, b, h) + row * p.query.token, p.query.token, rows, p.head_dim,
            s.query + row * s.width, s.width);
  copy_rows(base<T>(p.grad_out, b, h) + row * p.grad_out.token, p.grad_out.token, rows, p.head_dim,
            s.grad_out + row * s.width, s.width);
  load_sums(p, range, row, rows, s.lse, s.lse_low);
}

/// In place: dot products to weights, gradients of weights to scaled gradients of logits.
SVITT_INLINE void differentiate_tile(const CrossBackwardScratch& s, int64_t row, int lanes, int n,
                                     float scale) {
  for (int c = 0; c < lanes; c += W) {
    const vf lse = load(s.lse + row + c), low = load(s.lse_low + row + c);
    const vf delta = load(s.delta + row + c);
    for (int j = 0; j < n; ++j) {
      float *weights = s.weights + j * lanes + c, *slopes = s.slopes + j * lanes + c;
      const vf weight = exp_nonpositive(load(weights) * scale - lse - low);
      store(weights, weight);
      store(slopes, weight * (load(slopes) - delta) * scale);
    }
  }
}

/// A tile of keys against all queries.
template <class T>
void backward_tile(const CrossBackward& p, const KeyRange& range, int64_t j, int n,
                   CrossBackwardScratch& s) {
  const int dims = p.head_dim;
  const int64_t panel = static_cast<int64_t>(dims) * kPanel;
  const int32_t* present = p.present_of(range.b);
  const Rows keys = tile_rows<T, true>(p, p.key, range, j, n, s.keys, s.width);
  const Rows values = tile_rows<T, false>(p, p.value, range, j, n, s.values, s.width);
  float *weight_rows[kKeyTile], *slope_rows[kKeyTile], *key_rows[kKeyTile], *value_rows[kKeyTile];
  float* query_rows[kQueryTile];
  const auto result = [&](void* grad, int i) {
    const int64_t token = present == nullptr ? j + i : present[j + i];
    return result_row<T>(p, grad, p.keys, range.b, range.h, token);
  };
  for (int i = 0; i < n; ++i)
    key_rows[i] = s.grad_key + i * s.width, value_rows[i] = s.grad_value + i * s.width;
  each_query_tile(p, [&](int64_t tile, int64_t row, int rows) {
    const int lanes = round_up(rows, W);
    for (int i = 0; i < n; ++i)
      weight_rows[i] = s.weights + i * lanes, slope_rows[i] = s.slopes + i * lanes;
    for (int r = 0; r < rows; ++r) query_rows[r] = s.grad_query + (row + r) * s.width;
    multiply_keys<T>(p, range, j, n, keys, s.query_columns + tile * s.tile, lanes, weight_rows);
    const Segment grads{values.data, s.grad_columns + tile * s.tile, kPanel, panel, dims};
    multiply(n, lanes, &grads, 1, {values.step, 1}, slope_rows, false);
    differentiate_tile(s, row, lanes, n, p.scale);
    const Segment to_values{s.weights, s.grad_out + row * s.width, s.width, kPanel, rows};
    multiply(n, dims, &to_values, 1, {lanes, 1}, value_rows, row > 0);
    const Segment to_keys{s.slopes, s.query + row * s.width, s.width, kPanel, rows};
    multiply(n, dims, &to_keys, 1, {lanes, 1}, key_rows, row > 0);
    const Segment to_queries{s.slopes, keys.data, keys.step, kPanel, n};
    multiply(rows, dims, &to_queries, 1, {1, lanes}, query_rows, j > range.first);
  });
  const auto write = [&](T* to, const float* from) __attribute__((always_inline)) {
    if constexpr (sizeof(T) == sizeof(float))
      if (dims == s.width) return stream_row(from, to, dims);
    write_row(to, from, dims, 1.0f);
  };
  for (int i = 0; i < n; ++i) {
    write(result(p.grad_key, i), key_rows[i]);
    write(result(p.grad_value, i), value_rows[i]);
  }
}

/// Keys that are ignored, and all where there is no query, have no gradient; each part of a head
/// clears an equal share of them.
template <class T>
void clear_ignored(const CrossBackward& p, const KeyRange& range, int64_t part) {
  if (p.ignored == nullptr && p.queries > 0) return;
  for (int64_t k = p.keys * part / p.parts; k < p.keys * (part + 1) / p.parts; ++k)
    if (p.queries == 0 || p.ignored[range.b * p.keys + k]) {
      const size_t bytes = sizeof(T) * p.head_dim;
      T* grad_key = result_row<T>(p, p.grad_key, p.keys, range.b, range.h, k);
      T* grad_value = result_row<T>(p, p.grad_value, p.keys, range.b, range.h, k);
      std::memset(static_cast<void*>(grad_key), 0, bytes);
      std::memset(static_cast<void*>(grad_value), 0, bytes);
    }
}

/// Every item, by `load(range, row, rows)` for each tile of queries and `sweep(range, j, n)` for
/// each tile of keys, which sum the gradient of the queries up in rows of `width`.
template <class T, class Load, class Sweep>
void cross_backward_items(const CrossBackward& p, int64_t begin, int64_t end, float* grad_query,
                          int width, const Load& load, const Sweep& sweep) {
  for (int64_t item = begin; item < end; ++item) {
    const KeyRange range(p, item);
    clear_ignored<T>(p, range, item % p.parts);
    if (p.queries == 0) continue;
    each_query_tile(p, [&](int64_t, int64_t row, int rows) { load(range, row, rows); });
    for (int64_t j = range.first; j < range.last; j += kKeyTile)
      sweep(range, j, static_cast<int>(range.last - j < kKeyTile ? range.last - j : kKeyTile));
    if (range.first == range.last) std::memset(grad_query, 0, sizeof(float) * p.queries * width);
    for (int64_t row = 0; row < p.queries; ++row) {
      const float* from = grad_query + row * width;
      if (p.parts == 1) {
        write_row(result_row<T>(p, p.grad_query, p.queries, range.b, range.h, row), from,
                  p.head_dim, 1.0f);
      } else {
        std::memcpy(p.partials + (item * p.queries + row) * p.head_dim, from,
                    sizeof(float) * p.head_dim);
      }
    }
  }
}

template <class T>
void cross_backward_of(const CrossBackward& p, int64_t begin, int64_t end) {
  CrossBackwardScratch s(p);
  cross_backward_items<T>(
      p, begin, end, s.grad_query, s.width,
      [&](const KeyRange& range, int64_t row, int rows) {
        load_queries<T>(p, range, row, rows, s);
      },
      [&](const KeyRange& range, int64_t j, int n) { backward_tile<T>(p, range, j, n, s); });
  end_streams();
}

/// The gradient of the queries of a head: the sum over its parts, in order.
template <class T>
void cross_backward_heads(const CrossBackward& p, int64_t begin, int64_t end) {
  for (int64_t head = begin; head < end; ++head)
    for (int64_t row = 0; row < p.queries; ++row) {
      float* sum = p.partials + (head * p.parts * p.queries + row) * p.head_dim;
      for (int64_t i = 1; i < p.parts; ++i)
        for (int d = 0; d < p.head_dim; ++d) sum[d] += sum[i * p.queries * p.head_dim + d];
      write_row(result_row<T>(p, p.grad_query, p.queries, head / p.heads, head % p.heads, row), sum,
                p.head_dim, 1.0f);
    }
}

inline void cross_backward(const CrossBackward& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { cross_backward_of<decltype(x)>(p, begin, end); });
}

inline void cross_backward_join(const CrossBackward& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { cross_backward_heads<decltype(x)>(p, begin, end); });
}

SVITT_KERNELS_END
