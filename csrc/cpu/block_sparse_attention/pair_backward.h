// Backward for bf16 and fp32 on the AMX matrix tiles, and for bf16 by VDPBF16PS: the sweep of
// backward.h with its five products of pairs. The logits are summed as in the forward, whose
// log-sum-exp they meet.
//
// The tokens of a block of keys lie side by side, so that K and V in bf16 serve as left operands in
// place. Only weights and slopes are rounded to bf16; logits, their gradients, that of the bias
// table and all sums stay in fp32.
//
// Tried, without gain: huge pages for the results, which the heap mostly has in place. In fp32 a
// seventh of the time goes into splitting K and V anew for each row tile: kept for a head, in
// parts, they would fill the L2 cache.
#pragma once

#include "../common/pair_attention.h"

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "backward.h"
#include "bias.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

static_assert(kRowTile == kStride && kKeyTile == kStride);

template <class T>
struct TileBackwardScratch {
  using Value = T;
  // In three parts, the operands of a product of 64 keys would fill the L1 cache.
  static constexpr int kKeys = Operand<T>::kParts > 1 ? kTileRows : kStride;
  static constexpr bool kMerges = true;
  static constexpr int64_t kPart = kStride * kStride;  // of weights and slopes
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
    const int64_t rows = kStride * width, operand = Operand<T>::kParts * rows;
    arena.take_all(operand, query, grad_out, query_pairs, grad_pairs, keys, key_pairs);
    arena.take_all(Operand<T>::kParts * kPart, weights, slopes, turned);
    arena.take_all(kPart, logits, products);
    arena.take_all(kStride, lse, lse_low, delta);
    arena.take_all(rows, grad_query, sum);
    arena.take_all(p.tokens * width, grad_key, grad_value);
    lanes = arena.take<LaneCodes>(kStride / W);
  }
  void stage(const Backward& p, int64_t, int64_t) {
    std::memset(grad_key, 0, sizeof(float) * p.tokens * width);
    std::memset(grad_value, 0, sizeof(float) * p.tokens * width);
  }
};

/// Queries, upstream gradient, log-sum-exp and delta = rowsum(dO O) of a tile.
template <class T>
void load_tile(const Backward& p, const RowTile& t, TileBackwardScratch<T>& s) {
  using Lane = typename Operand<T>::Lane;
  const int lanes = round_up(t.rows, kTileRows), dims = s.width;
  const auto reader = [&](const Matrix& m) { return some_rows<Lane>(m, t.b, t.h, t.row, t.rows); };
  const auto query = reader(p.query), grad = reader(p.grad_out);
  Operand<T>::pack_keys(query, lanes, dims, s.query);
  Operand<T>::pack_keys(grad, lanes, dims, s.grad_out);
  Operand<T>::pack_values(query, lanes, dims, s.query_pairs);
  Operand<T>::pack_values(grad, lanes, dims, s.grad_pairs);
  row_products<T>(reader(p.out), s.grad_out, lanes, dims, s.keys, s.products, s.delta);
  describe_rows(p, t, s);
}

/// Weights and scaled gradients of the logits of n keys: `keys` from `key`, then globals; zeros
/// from there to `padded`.
template <class T, bool Bias>
SVITT_INLINE void differentiate_pairs(const Backward& p, const RowTile& t,
                                      const TileBackwardScratch<T>& s, int key, int keys, int n,
                                      int padded) {
  for (int c = 0; c < t.rows; c += kPairs) {
    for (int j = 0; j < padded; ++j) {
      const int token = j < keys ? key + j : j - keys;
      vf weight[2]{}, slope[2]{};
#pragma GCC unroll 2
      for (int k = 0; k < 2 && j < n; ++k) {
        const int lane = c + k * W, at = j * kStride + lane;
        if (Bias && lane >= t.columns) break;
        vf x = load(s.logits + at) * p.scale;
        if constexpr (Bias) x += bias_of_key<false>(p, t, s.lanes, token, lane, vf{});
        x = x - load(s.lse + lane) - load(s.lse_low + lane);
        weight[k] = Operand<T>::kParts > 1 ? exp_nonpositive(x) : exp2_bf16(x * kLog2e);
        slope[k] = weight[k] * (load(s.products + at) - load(s.delta + lane));
        if constexpr (Bias) bias_of_key<true>(p, t, s.lanes, token, lane, slope[k]);
        slope[k] *= p.scale;
      }
      const int at = j * kStride + c;
      Operand<T>::store_pairs(weight[0], weight[1], s.weights + at, s.kPart);
      Operand<T>::store_pairs(slope[0], slope[1], s.slopes + at, s.kPart);
      if constexpr (Operand<T>::kParts > 1) {
        store(s.products + at, slope[0]);
        store(s.products + at + W, slope[1]);
      }
    }
  }
}

/// Add the product of a block of weights with packed rows to the rows of its keys.
template <class T>
SVITT_INLINE void add_product(const uint16_t* weights, const uint16_t* packed, int key, int keys,
                              int n, int depth, const TileBackwardScratch<T>& s, float* to) {
  multiply_pairs<T>(weights, packed, round_up(n, kRowUnit), depth, s.width, s.sum, false, s.kPart);
  const auto add = [&](float* rows, const float* from, int count) {
    for (int i = 0; i < count * s.width; i += W) store(rows + i, load(rows + i) + load(from + i));
  };
  add(to + key * s.width, s.sum, keys);
  add(to, s.sum + keys * s.width, n - keys);
}

/// All products of a row tile with keys [key, key + keys) and with globals [0, globals).
template <class T>
void backward_keys(const Backward& p, const RowTile& t, TileBackwardScratch<T>& s, int key,
                   int keys, int globals, bool first) {
  using Lane = typename Operand<T>::Lane;
  const int n = keys + globals, dims = s.width;
  const int padded = round_up(n, kRowUnit), lanes = round_up(t.rows, kLaneUnit);
  const int depth = round_up(t.rows, kRowUnit);
  const int64_t part = static_cast<int64_t>(padded) * dims;
  const auto rows = [&](const Matrix& m) {
    const Lane* from = base<Lane>(m, t.b, t.h);
    return
        [=](int i) { return i < n ? from + (i < keys ? key + i : i - keys) * m.token : nullptr; };
  };
  // Rows past the last key of a block are those of the next one: their products go nowhere.
  const auto multiply_tokens = [&](const Matrix& m, const uint16_t* packed, float* products) {
    const bool in_place = Operand<T>::kParts == 1 && globals == 0 && key + padded <= p.tokens;
    if (!in_place) Operand<T>::copy(rows(m), padded, dims, s.keys, part);
    const auto* from = in_place ? reinterpret_cast<const uint16_t*>(rows(m)(0)) : s.keys;
    multiply_dims<T>(from, in_place ? m.token : dims, padded, packed, lanes, dims, products, part);
  };
  multiply_tokens(p.key, s.query, s.logits);
  multiply_tokens(p.value, s.grad_out, s.products);
  if (t.table == nullptr) {
    differentiate_pairs<T, false>(p, t, s, key, keys, n, padded);
  } else {
    differentiate_pairs<T, true>(p, t, s, key, keys, n, padded);
  }
  add_product(s.weights, s.grad_pairs, key, keys, n, depth, s, s.grad_value);
  add_product(s.slopes, s.query_pairs, key, keys, n, depth, s, s.grad_key);
  Operand<T>::pack_values(rows(p.key), padded, dims, s.key_pairs);
  turn_slopes<T>(s.slopes, s.products, padded, lanes, s.turned, s.kPart);
  multiply_pairs<T>(s.turned, s.key_pairs, depth, padded, dims, s.grad_query, !first, s.kPart);
}

template <class T>
void write_gradients(const Backward& p, int64_t b, int64_t h, const TileBackwardScratch<T>& s) {
  if constexpr (Operand<T>::kParts > 1) {
    write_head<T>(p, p.grad_key, b, h, s.grad_key, s.width);
    write_head<T>(p, p.grad_value, b, h, s.grad_value, s.width);
    return;
  }
  for (int64_t n = 0; n < p.tokens; ++n) {
    stream_row(s.grad_key + n * s.width, result_row<uint16_t>(p, p.grad_key, p.tokens, b, h, n),
               s.width);
    stream_row(s.grad_value + n * s.width, result_row<uint16_t>(p, p.grad_value, p.tokens, b, h, n),
               s.width);
  }
}

inline void backward_pairs(const Backward& p, int64_t begin, int64_t end) {
  const TileRegisters registers;
#if SVITT_TILES
  if (p.dtype == Dtype::f32) return backward_items<TileBackwardScratch<float>>(p, begin, end);
#endif
  backward_items<TileBackwardScratch<bf16>>(p, begin, end);
  _mm_sfence();  // streamed rows are seen by whoever sees that this is done
}

SVITT_KERNELS_END
