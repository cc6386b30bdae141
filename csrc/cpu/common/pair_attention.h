// Products of attention of bf16 pairs, beyond those of pair_tiles.h.
#pragma once

#include "pair_operand.h"
#if SVITT_TILES
#include "amx_parts.h"
#else
#include "avx512_bf16_gemm.h"
#endif
#include "attention_rows.h"

SVITT_KERNELS_BEGIN

// What rows, and lanes, are rounded up to: tiles are whole, vectors have the rows that there are.
constexpr int kRowUnit = SVITT_TILES ? kTileRows : 2, kLaneUnit = SVITT_TILES ? kTileRows : W;
constexpr int kStride = 64;  // of a block of weights: keys by queries, at most 64 x 64

/// Products over dims of the rows of A, a multiple of kRowUnit, with `lanes` packed ones.
template <class T = bf16>
SVITT_INLINE void multiply_dims(const uint16_t* from, int64_t stride, int rows,
                                const uint16_t* packed, int lanes, int dims, float* products,
                                int64_t part = 0) {
#if SVITT_TILES
  for (int r = 0; r < rows; r += kTileRows)
    for (int c = 0; c < lanes; c += kTileRows) {
      TileSum sum(products + r * kStride + c, kStride, false);
      Operand<T>::template add_dims<true>(sum, from + r * stride, stride, part, packed, c, dims);
      sum.store();
    }
#else
  (void)part;
  multiply(over_dims(from, stride, packed, dims), rows, lanes / W,
           store_sums(products, kStride, false));
#endif
}

/// delta = rowsum(dO O), the diagonal of the tile product O dO^T.
///
/// It is summed as V dO^T is: where a row has a single key, and O is V, the two are equal to the
/// last bit and their difference is 0, as it must be.
template <class T = bf16, class Rows>
SVITT_INLINE void row_products(const Rows& out, const uint16_t* grad_out, int lanes, int dims,
                               uint16_t* copy, float* products, float* delta) {
  const int64_t part = kTileRows * dims;
  for (int r = 0; r < lanes; r += kTileRows) {
    Operand<T>::copy([&](int i) { return out(r + i); }, kTileRows, dims, copy, part);
    multiply_dims<T>(copy, dims, kTileRows, grad_out + Operand<T>::kParts * r * dims, kTileRows,
                     dims, products, part);
    for (int i = 0; i < kTileRows; ++i) delta[r + i] = products[i * (kStride + 1)];
  }
}

/// 16 values in the lower half of a vector.
SVITT_INLINE __m512i load_half(const uint16_t* p) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

/// A block of slopes, `padded` keys by `lanes` queries, with the queries as rows.
SVITT_INLINE void turn_slopes(const uint16_t* slopes, int padded, int lanes, uint16_t* turned) {
  alignas(64) uint16_t interleave[32];
  for (int i = 0; i < 32; ++i) interleave[i] = static_cast<uint16_t>(i / 2 + 32 * (i % 2));
  const __m512i order = _mm512_load_si512(interleave);
  for (int c = 0; c < lanes; c += kTile)
    for (int j = 0; j < padded; j += kPairs) {
      vf pairs[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const uint16_t* even = slopes + (j + 2 * i) * kStride + c;
        pairs[i] = reinterpret_cast<vf>(
            _mm512_permutex2var_epi16(load_half(even), order, load_half(even + kStride)));
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) std::memcpy(turned + (c + i) * kStride + j, &pairs[i], 64);
    }
}

/// The same of slopes that are there in fp32 too, where there are parts to make of them.
template <class T>
SVITT_INLINE void turn_slopes(const uint16_t* slopes, const float* sums, int padded, int lanes,
                              uint16_t* turned, int64_t part) {
  if constexpr (Operand<T>::kParts == 1) {
    turn_slopes(slopes, padded, lanes, turned);
  } else {
    for (int c = 0; c < lanes; c += kTile)
      for (int j = 0; j < padded; j += kPairs)
        Operand<T>::pack_turned(sums + j * kStride + c, kStride, turned + c * kStride + j, kStride,
                                part);
  }
}

/// C (rows x dims) = or += A B over `depth`, a multiple of kRowUnit; B packed by pack_values.
template <class T = bf16>
SVITT_INLINE void multiply_pairs(const uint16_t* a, const uint16_t* b, int rows, int depth,
                                 int dims, float* c, bool add, int64_t part = 0) {
#if SVITT_TILES
  for (int r = 0; r < rows; r += kTileRows)
    for (int d = 0; d < dims; d += kPairs) {
      TileSum sum(c + r * dims + d, dims, add);
      Operand<T>::add_rows(sum, a + r * kStride, kStride, part, b, d, depth, dims);
      sum.store();
    }
#else
  (void)part;
  for (int k = 0; k < depth; k += kPairs) {
    const int pairs = (depth - k < kPairs ? depth - k : kPairs) / 2;
    multiply({a + k, kStride, 2, b + static_cast<int64_t>(k) * dims, kPairs, kTile * kPairs, pairs},
             rows, dims / W, store_sums(c, dims, add || k > 0));
  }
#endif
}

/// A result is not read here again: written past the caches, its lines need not be fetched first.
SVITT_INLINE void stream_row(const float* from, uint16_t* to, int dims) {
  for (int d = 0; d < dims; d += kPairs)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + d),
                        round_pairs(load(from + d), load(from + d + W)));
}

SVITT_KERNELS_END
