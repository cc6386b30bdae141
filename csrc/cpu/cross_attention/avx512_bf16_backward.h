// Backward for bf16 by VDPBF16PS: the sweep of backward.h with products of pairs.
//
// Keys are the rows of four products, so that K, V, the weights and the slopes serve as A as they
// are, against queries and upstream gradients packed once; the gradient of the queries reads the
// slopes of two neighbouring keys as pairs, and K packed. Weights and slopes are rounded to bf16
// for the products; logits, their gradients and all sums stay in fp32.
#pragma once

#include "../common/avx512_bf16_gemm.h"

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "avx512_bf16_forward.h"
#include "backward.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

struct CrossBackwardPairScratch {
  Arena arena;
  int dims;
  // Packed for products over dims, and over queries.
  uint16_t *query, *grad_out, *query_pairs, *grad_pairs;
  uint16_t *keys, *key_pairs;
  uint16_t *weights, *slopes;    // (kKeyTile, kQueryTile)
  uint16_t* slope_pairs;         // (kKeyTile / 2, kQueryTile) pairs
  float *logits, *products;      // of K Q^T and of V dO^T, (kKeyTile, kQueryTile)
  float *lse, *lse_low, *delta;  // of all queries
  float *grad_query, *grad_key, *grad_value;

  explicit CrossBackwardPairScratch(const CrossBackward& p) : dims(p.head_dim) {
    const int64_t lanes = (p.queries + kQueryTile - 1) / kQueryTile * kQueryTile;
    arena.take_all(lanes * dims, query, grad_out, query_pairs, grad_pairs);
    arena.take_all(kKeyTile * dims, keys, key_pairs);
    arena.take_all(kKeyTile * kQueryTile, weights, slopes, slope_pairs, logits, products);
    arena.take_all(lanes, lse, lse_low, delta);
    grad_query = arena.take<float>(lanes * dims);
    arena.take_all(kKeyTile * dims, grad_key, grad_value);
  }
};

/// Queries, upstream gradient, log-sum-exp and delta = rowsum(dO O) of a query tile. delta is
/// summed as V dO^T is: where a row has a single key, and O is V, the two are equal to the last bit
/// and their difference is 0, as it must be.
SVITT_INLINE void load_query_pairs(const CrossBackward& p, const KeyRange& range, int64_t row,
                                   int rows, CrossBackwardPairScratch& s) {
  const int lanes = round_up(rows, W), dims = s.dims;
  const int64_t at = row * dims;
  const auto reader = [&](const Matrix& m) {
    return some_rows<uint16_t>(m, range.b, range.h, row, rows);
  };
  const auto query = reader(p.query), grad = reader(p.grad_out);
  pack_key_tiles(query, lanes, dims, s.query + at);
  pack_key_tiles(grad, lanes, dims, s.grad_out + at);
  pack_row_pairs(query, rows, dims, s.query_pairs + at);
  pack_row_pairs(grad, rows, dims, s.grad_pairs + at);
  load_sums(p, range, row, rows, s.lse, s.lse_low);
  multiply(over_dims(reader(p.out)(0), p.out.token, s.grad_out + at, dims), rows, lanes / W,
           store_sums(s.products, lanes, false));
  for (int r = 0; r < lanes; ++r) s.delta[row + r] = r < rows ? s.products[r * (lanes + 1)] : 0.0f;
}

/// Weights and slopes, the scaled gradients of the logits, of n keys; an odd last one is followed
/// by zeros. Beside each key goes `fetch`.
template <class Fetch>
SVITT_INLINE void differentiate_pairs(const CrossBackwardPairScratch& s, int64_t row, int lanes,
                                      int n, float scale, const Fetch& fetch) {
  const __m512i order = pair_order();
  for (int c = 0; c < lanes; c += W) {
    const vf lse = load(s.lse + row + c), low = load(s.lse_low + row + c);
    const vf delta = load(s.delta + row + c);
    for (int j = 0; j < n; j += 2) {
      vf weight[2]{}, slope[2]{};
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        if (j + k >= n) break;
        if (c == 0) fetch(j + k);
        const int at = (j + k) * lanes + c;
        weight[k] = exp2_bf16((load(s.logits + at) * scale - lse - low) * kLog2e);
        slope[k] = weight[k] * (load(s.products + at) - delta) * scale;
      }
      const __m512i weights = round_pairs(weight[0], weight[1]);
      const __m512i slopes = round_pairs(slope[0], slope[1]);
      const auto store_rows = [&](__m512i pair, uint16_t* to) __attribute__((always_inline)) {
        to += j * lanes + c;
        std::memcpy(to, &pair, 32);
        const __m256i upper = _mm512_maskz_extracti64x4_epi64(0xff, pair, 1);
        std::memcpy(to + lanes, &upper, 32);
      };
      store_rows(weights, s.weights);
      store_rows(slopes, s.slopes);
      _mm512_storeu_si512(s.slope_pairs + j * lanes + 2 * c,
                          _mm512_permutexvar_epi16(order, slopes));
    }
  }
}

/// `backward_tile` of backward.h.
inline void backward_tile_pairs(const CrossBackward& p, const KeyRange& range, int64_t j, int n,
                                CrossBackwardPairScratch& s) {
  const int dims = s.dims;
  const TileKeys keys(p, p.key, range, j, n), values(p, p.value, range, j, n);
  const int64_t next = range.last - j < 2 * kKeyTile ? range.last : j + 2 * kKeyTile;
  const int count = static_cast<int>(range.last - next < kKeyTile ? range.last - next : kKeyTile);
  const TileKeys<> ahead[2] = {{p, p.key, range, next, count}, {p, p.value, range, next, count}};
  const int32_t* present = p.present_of(range.b);
  pack_row_pairs(keys, n, dims, s.key_pairs);
  each_query_tile(p, [&](int64_t, int64_t row, int rows) {
    const int lanes = round_up(rows, W);
    const int64_t at = row * dims;
    multiply_keys(keys, s.query + at, lanes, dims, s.keys, s.logits);
    multiply_keys(values, s.grad_out + at, lanes, dims, s.keys, s.products);
    differentiate_pairs(s, row, lanes, n, p.scale, [&](int i) __attribute__((always_inline)) {
      if (row > 0 || i >= count) return;
      prefetch_row<false>(ahead[0](i), dims);
      prefetch_row<false>(ahead[1](i), dims);
    });
    // A result is not read here again: written past the caches, its lines need not be fetched.
    const auto add_gradient = [&](const uint16_t* from, const uint16_t* packed, float* sum,
                                  void* grad) {
      const PairProduct product = over_rows(from, lanes, 2, packed + at, rows, dims);
      if (row + rows < p.queries)
        return multiply(product, n, dims / W, store_sums(sum, dims, row > 0));
      multiply(
          product, n, dims / W,
          [&]<int R, int C>(int i, int vector, vf(&sums)[R][C]) __attribute__((always_inline)) {
            for (int r = 0; r < R && row > 0; ++r)
              for (int v = 0; v < C; ++v)
                sums[r][v] += load(sum + (i + r) * dims + (vector + v) * W);
#pragma GCC unroll 16
            for (int r = 0; r < R && C > 1; ++r) {
              const int64_t token = present == nullptr ? j + i + r : present[j + i + r];
              _mm512_stream_si512(
                  reinterpret_cast<__m512i*>(
                      result_row<uint16_t>(p, grad, p.keys, range.b, range.h, token) + vector * W),
                  round_pairs(sums[r][0], sums[r][C - 1]));
            }
          });
    };
    add_gradient(s.weights, s.grad_pairs, s.grad_value, p.grad_value);
    add_gradient(s.slopes, s.query_pairs, s.grad_key, p.grad_key);
    multiply(over_rows(s.slope_pairs, 2, 2 * lanes, s.key_pairs, n, dims), rows, dims / W,
             store_sums(s.grad_query + at, dims, j > range.first));
  });
}

inline void cross_backward_pairs(const CrossBackward& p, int64_t begin, int64_t end) {
  CrossBackwardPairScratch s(p);
  cross_backward_items<bf16>(
      p, begin, end, s.grad_query, s.dims,
      [&](const KeyRange& range, int64_t row, int rows) {
        load_query_pairs(p, range, row, rows, s);
      },
      [&](const KeyRange& range, int64_t j, int n) { backward_tile_pairs(p, range, j, n, s); });
  _mm_sfence();  // streamed rows are seen by whoever sees that this is done
}

SVITT_KERNELS_END
