// Products of bf16 pairs by VDPBF16PS, their sums in registers: what gemm.h is for fp32.
//
// A is read by broadcast, a pair at a time with any strides: it is never turned, and has exactly
// the rows that there are. B is vectors of 16 pairs.
#pragma once

#ifndef SVITT_ISA
#define SVITT_ISA avx512_bf16
#endif

#include "gemm.h"
#include "pair_tiles.h"

SVITT_KERNELS_BEGIN

/// The pair k of row r of A is at a + r * row + k * step, vector v of B's row k at b + k * b_step +
/// v * b_next.
struct PairProduct {
  const uint16_t* a;
  int64_t row, step;
  const uint16_t* b;
  int64_t b_step, b_next;
  int pairs;
};

template <class Finish, int C, int R>
void multiply_pair_tile(const PairProduct& p, int row, int vector, const Finish& finish) {
  __m512 acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) acc[r][v] = _mm512_setzero_ps();
  const uint16_t* a = p.a + row * p.row;
  const uint16_t* b = p.b + vector * p.b_next;
  for (int k = 0; k < p.pairs; ++k, a += p.step, b += p.b_step) {
    __m512bh loaded[C];
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) loaded[v] = (__m512bh)_mm512_loadu_si512(b + v * p.b_next);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t both;
      std::memcpy(&both, a + r * p.row, 4);
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 2
      for (int v = 0; v < C; ++v) acc[r][v] = add_pairs(acc[r][v], pair, loaded[v]);
    }
  }
  vf sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < C; ++v) sums[r][v] = reinterpret_cast<vf>(acc[r][v]);
  finish(row, vector, sums);
}

template <class Finish, int C, int... R>
struct PairTiles {
  static constexpr void (*table[])(const PairProduct&, int, int,
                                   const Finish&) = {multiply_pair_tile<Finish, C, R>...};
};
template <class Finish, int C>
using AllPairTiles = PairTiles<Finish, C, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;

/// A B, up to kRows rows of one or two vectors at a time: `finish(row, vector, sums)`, with the
/// sums an array of such rows.
template <class Finish>
SVITT_INLINE void multiply(const PairProduct& p, int rows, int vectors, const Finish& finish) {
  const int groups = (rows + kRows - 1) / kRows;
  for (int g = 0; g < groups; ++g) {
    const int first = rows * g / groups, size = rows * (g + 1) / groups - first;
    for (int v = 0; v < vectors; v += 2) {
      const auto& table =
          vectors - v > 1 ? AllPairTiles<Finish, 2>::table : AllPairTiles<Finish, 1>::table;
      table[size - 1](p, first, v, finish);
    }
  }
}

/// Sums as rows of fp32, `stride` apart; added to what is there, or not. Asking so for each vector
/// would take a fifth of the time of a product over 64 dims.
SVITT_INLINE auto store_sums(float* to, int64_t stride, bool add) {
  return [=]<int R, int C>(int row, int vector, const vf(&sums)[R][C])
             __attribute__((always_inline)) {
               float* at = to + row * stride + vector * W;
               if (add) {
#pragma GCC unroll 16
                 for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                   for (int v = 0; v < C; ++v)
                     store(at + r * stride + v * W, load(at + r * stride + v * W) + sums[r][v]);
               } else {
#pragma GCC unroll 16
                 for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
                   for (int v = 0; v < C; ++v) store(at + r * stride + v * W, sums[r][v]);
               }
             };
}

/// Pairs of neighbouring rows, an odd last one with zeros, as B of a product that sums over rows.
template <class Rows>
SVITT_INLINE void pack_row_pairs(const Rows& rows, int count, int dims, uint16_t* to) {
  alignas(64) uint16_t interleave[2][32];
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 32; ++i)
      interleave[half][i] = static_cast<uint16_t>(16 * half + i / 2 + 32 * (i % 2));
  const __m512i low = _mm512_load_si512(interleave[0]), high = _mm512_load_si512(interleave[1]);
  for (int i = 0; i < count; i += 2) {
    const uint16_t *even = rows(i), *odd = i + 1 < count ? rows(i + 1) : nullptr;
    for (int d = 0; d < dims; d += kPairs, to += 2 * kPairs) {
      const __m512i x = load_pairs(even, d), y = load_pairs(odd, d);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, low, y));
      _mm512_storeu_si512(to + kPairs, _mm512_permutex2var_epi16(x, high, y));
    }
  }
}

/// The product of rows, or of their sums, with packed rows: `lanes` columns over dims.
SVITT_INLINE PairProduct over_dims(const uint16_t* rows, int64_t stride, const uint16_t* columns,
                                   int dims) {
  return {rows, stride, 2, columns, kPairs, static_cast<int64_t>(kTile) * dims, dims / 2};
}
/// That of pairs at `a` with `count` rows packed by pack_row_pairs.
SVITT_INLINE PairProduct over_rows(const uint16_t* a, int64_t row, int64_t step,
                                   const uint16_t* packed, int count, int dims) {
  return {a, row, step, packed, 2 * static_cast<int64_t>(dims), kPairs, (count + 1) / 2};
}

/// The order that makes pairs of the values of two vectors that were rounded one behind the other.
SVITT_INLINE __m512i pair_order() {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + 16 * (i % 2));
  return _mm512_load_si512(order);
}

SVITT_KERNELS_END
