// 32 x 32 products of bf16, accumulated in fp32, by the AMX matrix tiles or, where there are none,
// by VDPBF16PS; and a cheap exponential.
//
// Either takes A as rows of 32 bf16 and B as 16 rows of 16 pairs: for Q K^T a pair is two
// neighbouring dims of one row, for P V one dim of two neighbouring rows. Rows to be packed are
// given as a function from their number to their address, null where there is none.
#pragma once

#ifndef SVITT_ISA
#define SVITT_ISA amx  // for an editor: only this and avx512_bf16 multiply pairs
#endif

#include "simd.h"

SVITT_KERNELS_BEGIN

constexpr int kTile = 16;
constexpr int kPairs = 32;  // bf16 values a tile row holds
constexpr int kTileRows = 2 * kTile;

#if SVITT_TILES
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Not on the stack: gcc takes the load to read 8 bytes, and would drop the stores of the others.
constexpr TileConfig kTileConfig;

/// While it lives, the tile registers can be used.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kTileConfig); }
  ~TileRegisters() { _tile_release(); }
};
#else
class TileRegisters {
 public:
  TileRegisters() {}
  ~TileRegisters() {}
};
#endif

/// B tiles of Q K^T: tile (key group, dim group) holds pair row k, column n = key n, dims 2k, 2k
/// + 1.
template <class Rows>
SVITT_INLINE void pack_key_tiles(const Rows& rows, int columns, int dims, uint16_t* packed) {
  for (int i = 0; i < columns; i += kTile)
    for (int d = 0; d < dims; d += kPairs, packed += kTile * kPairs) {
      vf pairs[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        const uint16_t* row = rows(i + r);
        pairs[r] = row == nullptr ? vf{} : load_as<vf>(row + d);
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) std::memcpy(packed + r * kPairs, &pairs[r], 64);
    }
}

/// 32 sums rounded to bf16, in order.
SVITT_INLINE __m512i round_pairs(vf low, vf high) {
  const auto rounded =
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  __m512i bits;
  std::memcpy(&bits, &rounded, 64);
  return bits;
}

/// 32 values of a row, or zeros where there is none.
SVITT_INLINE __m512i load_pairs(const uint16_t* row, int d) {
  return row == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(row + d);
}

/// Copies of rows one after another, zeros where there is none.
template <class Rows>
SVITT_INLINE void copy_pairs(const Rows& rows, int count, int dims, uint16_t* to) {
  for (int i = 0; i < count; ++i)
    for (int d = 0; d < dims; d += kPairs)
      _mm512_storeu_si512(to + i * dims + d, load_pairs(rows(i), d));
}

/// B tiles of P V: tile (key group of 32, dim group of 16) holds pair row k = keys 2k, 2k + 1.
template <class Rows>
SVITT_INLINE void pack_value_tiles(const Rows& rows, int columns, int dims, uint16_t* packed) {
  alignas(64) uint16_t interleave[2][32];
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 32; ++i)
      interleave[half][i] = static_cast<uint16_t>(16 * half + i / 2 + 32 * (i % 2));
  const __m512i low = _mm512_load_si512(interleave[0]), high = _mm512_load_si512(interleave[1]);
  const int64_t tile = kTile * kPairs;
  for (int i = 0; i < columns; i += 2) {
    const uint16_t *even = rows(i), *odd = rows(i + 1);
    uint16_t* to = packed + (i / kPairs) * (dims / kTile) * tile + (i % kPairs) / 2 * kPairs;
    for (int d = 0; d < dims; d += kPairs, to += 2 * tile) {
      _mm512_storeu_si512(to,
                          _mm512_permutex2var_epi16(load_pairs(even, d), low, load_pairs(odd, d)));
      _mm512_storeu_si512(to + tile,
                          _mm512_permutex2var_epi16(load_pairs(even, d), high, load_pairs(odd, d)));
    }
  }
}

#if SVITT_TILES
/// A block of C, 32 x 32, = or += products, each at least one step; in the tile registers from its
/// making to `store`.
struct TileSum {
  float* c;
  int64_t stride;

  SVITT_INLINE TileSum(float* to, int64_t to_stride, bool add) : c(to), stride(to_stride) {
    if (add) {
      const float* low = c + kTile * stride;
      _tile_loadd(0, c, 4 * stride);
      _tile_loadd(1, c + kTile, 4 * stride);
      _tile_loadd(2, low, 4 * stride);
      _tile_loadd(3, low + kTile, 4 * stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  /// += A B: A is 32 rows, B two tiles side by side, `b_next` apart.
  SVITT_INLINE void add(int steps, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                        int64_t b_step, int64_t b_next) {
    for (int k = 0; k < steps; ++k, a += kPairs, b += b_step) {
      _tile_loadd(4, a, 2 * a_stride);
      _tile_loadd(6, b, 64);
      _tile_loadd(5, a + kTile * a_stride, 2 * a_stride);
      _tile_loadd(7, b + b_next, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  SVITT_INLINE void store() {
    float* low = c + kTile * stride;
    _tile_stored(0, c, 4 * stride);
    _tile_stored(1, c + kTile, 4 * stride);
    _tile_stored(2, low, 4 * stride);
    _tile_stored(3, low + kTile, 4 * stride);
  }
};
#else
/// += products of pairs. Of `bench.predict.stand_in` they are wrong, in the time that they take on
/// a processor that starts two a cycle, as every one with AVX-512 starts fp32 multiply-adds.
SVITT_INLINE __m512 add_pairs(__m512 sum, __m512bh a, __m512bh b) {
#ifdef SVITT_STAND_IN
  return _mm512_fmadd_ps((__m512)a, (__m512)b, sum);
#else
  return _mm512_dpbf16_ps(sum, a, b);
#endif
}

/// The same on vectors: rows in three groups, so that their sums fit the registers.
struct TileSum {
  float* c;
  int64_t stride;
  bool more;  // whether there is a sum yet

  SVITT_INLINE TileSum(float* to, int64_t to_stride, bool add)
      : c(to), stride(to_stride), more(add) {}
  template <int R>
  SVITT_INLINE void add_some(int first, int steps, const uint16_t* a, int64_t a_stride,
                             const uint16_t* b, int64_t b_step, int64_t b_next) {
    __m512 sums[R][2];
    float* to = c + first * stride;
    a += first * a_stride;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
        sums[r][j] = more ? _mm512_loadu_ps(to + r * stride + j * W) : _mm512_setzero_ps();
    for (int k = 0; k < steps; ++k, a += kPairs, b += b_step)
      for (int pair = 0; pair < kTile; ++pair) {
        const __m512bh first_b = (__m512bh)_mm512_loadu_si512(b + pair * kPairs),
                       second_b = (__m512bh)_mm512_loadu_si512(b + b_next + pair * kPairs);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int32_t both;
          std::memcpy(&both, a + r * a_stride + 2 * pair, 4);
          const __m512bh spread = (__m512bh)_mm512_set1_epi32(both);
          sums[r][0] = add_pairs(sums[r][0], spread, first_b);
          sums[r][1] = add_pairs(sums[r][1], spread, second_b);
        }
      }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(to + r * stride + j * W, sums[r][j]);
  }
  SVITT_INLINE void add(int steps, const uint16_t* a, int64_t a_stride, const uint16_t* b,
                        int64_t b_step, int64_t b_next) {
    add_some<11>(0, steps, a, a_stride, b, b_step, b_next);
    add_some<11>(11, steps, a, a_stride, b, b_step, b_next);
    add_some<10>(22, steps, a, a_stride, b, b_step, b_next);
    more = true;
  }
  SVITT_INLINE void store() {}
};
#endif

/// 2^x to 3e-6 with the processor's own range reduction; -inf gives 0.
SVITT_INLINE vf exp2_bf16(vf x) {
  constexpr int kFloor = 1;
  const __m512 t = reinterpret_cast<__m512>(x);
  const vf f = reinterpret_cast<vf>(_mm512_maskz_reduce_ps(0xffff, t, kFloor));  // t - floor(t)
  vf p = splat(0.013534166850149632f) * f + 0.05201146379113197f;
  p = p * f + 0.2414427548646927f;
  p = p * f + 0.6930038332939148f;
  p = p * f + 1.0000026226043701f;
  return reinterpret_cast<vf>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), t));
}

SVITT_KERNELS_END
