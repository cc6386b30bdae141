// Backward for bf16 on the AMX matrix tiles: the sweep of backward.h with its five products on
// 16 x 16 tiles.
//
// Keys are the rows of four products, so that K, V, the weights and the slopes serve as left
// operands as they are, against queries and upstream gradients packed once. The gradient of the
// queries alone needs K packed and the slopes turned. Weights and slopes are rounded to bf16 for
// the products; logits, their gradients and all sums stay in fp32.
//
// What remains is memory: the rows of the results lie `heads` rows apart, where streaming stores
// took half the time of plain ones, and less than plain ones with their lines prefetched.
//
// Tried, without gain: leaving out the upper 16 lanes where there are at most 16 queries; several
// heads in turn for each tile of keys (of the memory traffic alone); prefetching nothing (1.05 to
// 1.15 times slower), or one tile ahead instead of two (1.02); streaming all rows of a tile at its
// end (1.05).
#pragma once

#include "../common/pair_attention.h"

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "amx_forward.h"
#include "backward.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

static_assert(kQueryTile == kStride && kKeyTile == kStride);

struct CrossBackwardTileScratch {
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
    arena.take_all(lanes * dims, query, grad_out, query_pairs, grad_pairs);
    arena.take_all(kKeyTile * dims, keys, values, key_pairs);
    arena.take_all(kKeyTile * kQueryTile, weights, slopes, turned, logits, products);
    arena.take_all(lanes, lse, lse_low, delta);
    grad_query = arena.take<float>(lanes * dims);
    arena.take_all(kKeyTile * dims, grad_key, grad_value);
  }
};

/// Queries, upstream gradient, log-sum-exp and delta = rowsum(dO O) of a query tile.
SVITT_INLINE void load_query_tiles(const CrossBackward& p, const KeyRange& range, int64_t row,
                                   int rows, CrossBackwardTileScratch& s) {
  const int lanes = round_up(rows, kTileRows), dims = s.dims;
  const int64_t at = row * dims;
  const auto reader = [&](const Matrix& m) {
    return some_rows<uint16_t>(m, range.b, range.h, row, rows);
  };
  const auto query = reader(p.query), grad = reader(p.grad_out), out = reader(p.out);
  pack_key_tiles(query, lanes, dims, s.query + at);
  pack_key_tiles(grad, lanes, dims, s.grad_out + at);
  pack_value_tiles(query, lanes, dims, s.query_pairs + at);
  pack_value_tiles(grad, lanes, dims, s.grad_pairs + at);
  load_sums(p, range, row, rows, s.lse, s.lse_low);
  row_products(out, s.grad_out + at, lanes, dims, s.keys, s.products, s.delta + row);
}

/// Weights and slopes, the scaled gradients of the logits, of n keys, zeros from there to `padded`.
/// Beside the weights of each key goes `fetch`.
template <class Fetch>
SVITT_INLINE void differentiate_pairs(const CrossBackwardTileScratch& s, int64_t row, int lanes,
                                      int n, int padded, float scale, const Fetch& fetch) {
  for (int c = 0; c < lanes; c += kPairs) {
    for (int j = 0; j < n; ++j) {
      if (c == 0) fetch(j);
      vf weight[2], slope[2];
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const int at = j * kQueryTile + c + k * W;
        const int64_t lane = row + c + k * W;
        const vf x = load(s.logits + at) * scale - load(s.lse + lane) - load(s.lse_low + lane);
        weight[k] = exp2_bf16(x * kLog2e);
        slope[k] = weight[k] * (load(s.products + at) - load(s.delta + lane)) * scale;
      }
      _mm512_store_si512(s.weights + j * kQueryTile + c, round_pairs(weight[0], weight[1]));
      _mm512_store_si512(s.slopes + j * kQueryTile + c, round_pairs(slope[0], slope[1]));
    }
    for (int j = n; j < padded; ++j) {
      _mm512_store_si512(s.weights + j * kQueryTile + c, _mm512_setzero_si512());
      _mm512_store_si512(s.slopes + j * kQueryTile + c, _mm512_setzero_si512());
    }
  }
}

/// `backward_tile` of backward.h.
inline void backward_tile_amx(const CrossBackward& p, const KeyRange& range, int64_t j, int n,
                              CrossBackwardTileScratch& s) {
  const int dims = s.dims, padded = round_up(n, kPairs);
  const TileKeys keys(p, p.key, range, j, n), values(p, p.value, range, j, n);
  const int64_t next = range.last - j < 2 * kKeyTile ? range.last : j + 2 * kKeyTile;
  const int count = static_cast<int>(range.last - next < kKeyTile ? range.last - next : kKeyTile);
  const TileKeys ahead[2] = {{p, p.key, range, next, count}, {p, p.value, range, next, count}};
  const int32_t* present = p.present_of(range.b);
  const auto result = [&](void* grad, int i) {
    const int64_t token = present == nullptr ? j + i : present[j + i];
    return result_row<uint16_t>(p, grad, p.keys, range.b, range.h, token);
  };
  pack_value_tiles(keys, padded, dims, s.key_pairs);
  each_query_tile(p, [&](int64_t, int64_t row, int rows) {
    const int lanes = round_up(rows, kTileRows);
    const int64_t at = row * dims;
    multiply_keys(keys, padded, s.query + at, lanes, dims, s.keys, s.logits);
    multiply_keys(values, padded, s.grad_out + at, lanes, dims, s.values, s.products);
    differentiate_pairs(s, row, lanes, n, padded, p.scale,
                        [&](int i) __attribute__((always_inline)) {
                          if (row > 0 || i >= count) return;
                          prefetch_row<false>(ahead[0](i), dims);
                          prefetch_row<false>(ahead[1](i), dims);
                        });
    const auto add_gradient = [&](const uint16_t* from, const uint16_t* packed, float* sum,
                                  void* grad) {
      for (int r = 0; r < padded; r += kTileRows) {
        multiply_pairs(from + r * kQueryTile, packed + at, kTileRows, lanes, dims, sum + r * dims,
                       row > 0);
        if (row + rows < p.queries) continue;
        for (int i = r; i < n && i < r + kTileRows; ++i)
          stream_row(sum + i * dims, result(grad, i), dims);
      }
    };
    add_gradient(s.weights, s.grad_pairs, s.grad_value, p.grad_value);
    turn_slopes(s.slopes, padded, lanes, s.turned);
    add_gradient(s.slopes, s.query_pairs, s.grad_key, p.grad_key);
    multiply_pairs(s.turned, s.key_pairs, lanes, padded, dims, s.grad_query + at, j > range.first);
  });
}

inline void cross_backward_amx(const CrossBackward& p, int64_t begin, int64_t end) {
  const TileRegisters registers;
  CrossBackwardTileScratch s(p);
  cross_backward_items<bf16>(
      p, begin, end, s.grad_query, s.dims,
      [&](const KeyRange& range, int64_t row, int rows) {
        load_query_tiles(p, range, row, rows, s);
      },
      [&](const KeyRange& range, int64_t j, int n) { backward_tile_amx(p, range, j, n, s); });
  _mm_sfence();  // streamed rows are seen by whoever sees that this is done
}

SVITT_KERNELS_END
