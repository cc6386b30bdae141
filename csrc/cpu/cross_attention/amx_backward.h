// Backward for bf16 and fp32 on the AMX matrix tiles: the sweep of backward.h with its five
// products on 16 x 16 tiles.
//
// Keys are the rows of four products, so that K, V, the weights and the slopes serve as left
// operands as they are, or split into parts, against queries and upstream gradients packed once.
// The gradient of the queries alone needs K packed and the slopes turned. In bf16 weights and
// slopes are rounded for the products; logits, their gradients and all sums stay in fp32.
//
// What remains is memory: the rows of the results lie `heads` rows apart, where streaming stores
// took half the time of plain ones, and less than plain ones with their lines prefetched.
//
// Tried, without gain: leaving out the upper 16 lanes where there are at most 16 queries; several
// heads in turn for each tile of keys (of the memory traffic alone); prefetching nothing (1.05 to
// 1.15 times slower), or one tile ahead instead of two (1.02); streaming all rows of a tile at its
// end (1.05). In fp32: 64 keys at a time (0.95 to 1.06), or K and V split between the products
// (1.05 to 1.15 from the L2 cache).
#pragma once

#include "../common/pair_attention.h"

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "amx_forward.h"
#include "backward.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

template <class T>
struct CrossBackwardTileScratch {
  static constexpr int kParts = Operand<T>::kParts;
  // In three parts, the operands of a product of 64 keys would fill the L1 cache.
  static constexpr int kKeys = kParts > 1 ? kTileRows : kKeyTile;
  static constexpr int64_t kPart = kKeyTile * kQueryTile;  // of weights and slopes
  Arena arena;
  int dims;
  // Packed for products over dims, and over queries.
  uint16_t *query, *grad_out, *query_pairs, *grad_pairs;
  uint16_t *keys, *values, *key_pairs;
  uint16_t *weights, *slopes;    // (kKeyTile, kQueryTile)
  uint16_t* turned;              // slopes, (kQueryTile, kKeyTile)
  float *logits, *products;      // of K Q^T and of V dO^T, (kKeyTile, kQueryTile)
  float *lse, *lse_low, *delta;  // of all queries
  float *grad_query, *grad_key, *grad_value;

  explicit CrossBackwardTileScratch(const CrossBackward& p) : dims(p.head_dim) {
    const int64_t lanes = (p.queries + kQueryTile - 1) / kQueryTile * kQueryTile;
    arena.take_all(kParts * lanes * dims, query, grad_out, query_pairs, grad_pairs);
    arena.take_all(kParts * kTileRows * dims, keys, values);
    key_pairs = arena.take<uint16_t>(kParts * kKeys * dims);
    arena.take_all(kParts * kPart, weights, slopes, turned);
    arena.take_all(kKeyTile * kQueryTile, logits, products);
    arena.take_all(lanes, lse, lse_low, delta);
    grad_query = arena.take<float>(lanes * dims);
    arena.take_all(kKeyTile * dims, grad_key, grad_value);
  }
};

/// Queries, upstream gradient, log-sum-exp and delta = rowsum(dO O) of a query tile.
template <class T>
void load_query_tiles(const CrossBackward& p, const KeyRange& range, int64_t row, int rows,
                      CrossBackwardTileScratch<T>& s) {
  const int lanes = round_up(rows, kTileRows), dims = s.dims;
  const int64_t at = s.kParts * row * dims;
  const auto reader = [&](const Matrix& m) {
    return some_rows<typename Operand<T>::Lane>(m, range.b, range.h, row, rows);
  };
  const auto query = reader(p.query), grad = reader(p.grad_out), out = reader(p.out);
  Operand<T>::pack_keys(query, lanes, dims, s.query + at);
  Operand<T>::pack_keys(grad, lanes, dims, s.grad_out + at);
  Operand<T>::pack_values(query, lanes, dims, s.query_pairs + at);
  Operand<T>::pack_values(grad, lanes, dims, s.grad_pairs + at);
  load_sums(p, range, row, rows, s.lse, s.lse_low);
  row_products<T>(out, s.grad_out + at, lanes, dims, s.keys, s.products, s.delta + row);
}

/// Weights and slopes, the scaled gradients of the logits, of n keys, zeros from there to `padded`.
/// Beside the weights of each key goes `fetch`.
template <class T, class Fetch>
SVITT_INLINE void differentiate_pairs(const CrossBackwardTileScratch<T>& s, int64_t row, int lanes,
                                      int n, int padded, float scale, const Fetch& fetch) {
  for (int c = 0; c < lanes; c += kPairs)
    for (int j = 0; j < padded; ++j) {
      if (c == 0) fetch(j);
      vf weight[2]{}, slope[2]{};
#pragma GCC unroll 2
      for (int k = 0; k < 2 && j < n; ++k) {
        const int at = j * kQueryTile + c + k * W;
        const int64_t lane = row + c + k * W;
        const vf x = load(s.logits + at) * scale - load(s.lse + lane) - load(s.lse_low + lane);
        weight[k] = Operand<T>::kParts > 1 ? exp_nonpositive(x) : exp2_bf16(x * kLog2e);
        slope[k] = weight[k] * (load(s.products + at) - load(s.delta + lane)) * scale;
      }
      const int at = j * kQueryTile + c;
      Operand<T>::store_pairs(weight[0], weight[1], s.weights + at, s.kPart);
      Operand<T>::store_pairs(slope[0], slope[1], s.slopes + at, s.kPart);
      if constexpr (Operand<T>::kParts > 1) {
        store(s.products + at, slope[0]);
        store(s.products + at + W, slope[1]);
      }
    }
}

/// `backward_tile` of backward.h, of at most kKeys keys.
template <class T>
void backward_tile_amx(const CrossBackward& p, const KeyRange& range, int64_t j, int n,
                       CrossBackwardTileScratch<T>& s) {
  using Keys = TileKeys<typename Operand<T>::Lane>;
  const int dims = s.dims, padded = round_up(n, kPairs);
  const Keys keys(p, p.key, range, j, n), values(p, p.value, range, j, n);
  const int64_t next = range.last - j < 2 * s.kKeys ? range.last : j + 2 * s.kKeys;
  const int count = static_cast<int>(range.last - next < s.kKeys ? range.last - next : s.kKeys);
  const Keys ahead[2] = {{p, p.key, range, next, count}, {p, p.value, range, next, count}};
  const int32_t* present = p.present_of(range.b);
  const auto result = [&](void* grad, int i) {
    const int64_t token = present == nullptr ? j + i : present[j + i];
    return result_row<typename Operand<T>::Lane>(p, grad, p.keys, range.b, range.h, token);
  };
  Operand<T>::pack_values(keys, padded, dims, s.key_pairs);
  each_query_tile(p, [&](int64_t, int64_t row, int rows) {
    const int lanes = round_up(rows, kTileRows);
    const int64_t at = s.kParts * row * dims;
    const bool copied = s.kParts > 1 && row > 0;
    multiply_keys<T>(keys, padded, s.query + at, lanes, dims, s.keys, s.logits, copied);
    multiply_keys<T>(values, padded, s.grad_out + at, lanes, dims, s.values, s.products, copied);
    differentiate_pairs(s, row, lanes, n, padded, p.scale,
                        [&](int i) __attribute__((always_inline)) {
                          if (row > 0 || i >= count) return;
                          prefetch_row<false>(ahead[0](i), dims);
                          prefetch_row<false>(ahead[1](i), dims);
                        });
    const auto add_gradient = [&](const uint16_t* from, const uint16_t* packed, float* sum,
                                  void* grad) {
      for (int r = 0; r < padded; r += kTileRows) {
        multiply_pairs<T>(from + r * kQueryTile, packed + at, kTileRows, lanes, dims,
                          sum + r * dims, row > 0, s.kPart);
        if (row + rows < p.queries) continue;
        for (int i = r; i < n && i < r + kTileRows; ++i)
          stream_row(sum + i * dims, result(grad, i), dims);
      }
    };
    add_gradient(s.weights, s.grad_pairs, s.grad_value, p.grad_value);
    turn_slopes<T>(s.slopes, s.products, padded, lanes, s.turned, s.kPart);
    add_gradient(s.slopes, s.query_pairs, s.grad_key, p.grad_key);
    multiply_pairs<T>(s.turned, s.key_pairs, lanes, padded, dims, s.grad_query + row * dims,
                      j > range.first, s.kPart);
  });
}

template <class T>
void cross_backward_tiles(const CrossBackward& p, int64_t begin, int64_t end) {
  const TileRegisters registers;
  CrossBackwardTileScratch<T> s(p);
  cross_backward_items<T>(
      p, begin, end, s.grad_query, s.dims,
      [&](const KeyRange& range, int64_t row, int rows) {
        load_query_tiles(p, range, row, rows, s);
      },
      [&](const KeyRange& range, int64_t j, int n) {
        for (int i = 0; i < n; i += s.kKeys)
          backward_tile_amx(p, range, j + i, n - i < s.kKeys ? n - i : s.kKeys, s);
      });
  end_streams();
}

inline void cross_backward_amx(const CrossBackward& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::f32) return cross_backward_tiles<float>(p, begin, end);
  cross_backward_tiles<bf16>(p, begin, end);
}

SVITT_KERNELS_END
