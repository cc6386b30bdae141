// The contrastive losses for bf16 on the AMX matrix tiles: the same sweeps with all products on
// them.
//
// Similarities are sums of exact products in fp32, as elsewhere. The weights are rounded to bf16
// once, for the two products that sum rows; all else, the temperature's gradient too, takes them
// as they are. On the tests' cases that leaves nine tenths of the error budget, so they are not
// split into two bf16 each.
//
// Tried, without effect beyond noise: 32 or 128 queries at a time, chunks of 256 queries, sums of
// 512 without storing between.
#pragma once

#include "arena.h"
#include "contrast.h"
#include "contrast_tiles.h"
#include "pair_tiles.h"

SVITT_KERNELS_BEGIN

constexpr int kAmxRows = 64;  // queries at a time: with the keys of one step they fit the L1 cache
constexpr int kAmxDepth = 256;  // of a sum, likewise
constexpr int64_t kTileSize = kTile * kPairs;
static_assert(kGradStride == kDotStride);  // weights take the place of similarities

/// B of a product: its tiles, `step` apart along the sum and `next` along the columns.
struct TiledB {
  const uint16_t* data;
  int64_t step, next;
};

/// C (rows x columns) = or += A B; all sizes are multiples of 32.
inline void multiply_amx(int rows, int columns, int depth, const uint16_t* a, int64_t a_stride,
                         TiledB b, float* c, int64_t c_stride, bool add) {
  for (int k = 0; k < depth; k += kAmxDepth) {
    const int steps = (depth - k < kAmxDepth ? depth - k : kAmxDepth) / kPairs;
    const uint16_t* part = b.data + k / kPairs * b.step;
    for (int first = 0; first < rows; first += kAmxRows)
      for (int j = 0; j < columns; j += kPairs)
        for (int i = first; i < rows && i < first + kAmxRows; i += kTileRows) {
          TileSum sum(c + i * c_stride + j, c_stride, add || k > 0);
          sum.add(steps, a + i * a_stride + k, a_stride, part + j / kTile * b.next, b.step, b.next);
          sum.store();
        }
  }
}

/// Groups of rows; `copy` (32, padded dim) is for those that cannot be read in place.
inline void pack_operands(const TileOperands& to, int64_t begin, int64_t end, uint16_t* copy) {
  const int dims = to.padded_dim();
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kTileRows, left = to.count - first, at = first * dims;
    const int rows = static_cast<int>(left < kTileRows ? left : kTileRows);
    const uint16_t* from = row_of<uint16_t>(to.data, to.step, first);
    int64_t step = to.step;
    if (to.plain != nullptr || rows < kTileRows || dims != to.dim) {
      uint16_t* padded = to.plain != nullptr ? to.plain + at : copy;
      std::memset(padded, 0, sizeof(uint16_t) * kTileRows * dims);
      for (int r = 0; r < rows; ++r)
        std::memcpy(padded + r * dims, from + r * step, sizeof(uint16_t) * to.dim);
      from = padded, step = dims;
    }
    const auto row = [&](int r) { return from + r * step; };
    if (to.columns != nullptr) pack_key_tiles(row, kTileRows, dims, to.columns + at);
    if (to.values != nullptr) pack_value_tiles(row, kTileRows, dims, to.values + at);
  }
}

inline void contrast_pack_tiles(const TileOperands& to, int64_t begin, int64_t end) {
  Arena arena;
  pack_operands(to, begin, end, arena.take<uint16_t>(kTileRows * to.padded_dim()));
}

constexpr PackKernels kTilePack = {[](const Contrast& p) { return p.dtype == Dtype::bf16; },
                                   contrast_pack_queries, contrast_pack_keys, contrast_pack_tiles};

/// Similarities of some queries with a tile of packed keys.
SVITT_INLINE void compute_amx(const DotTile& t, const TileOperands& queries,
                              const TileOperands& keys) {
  const int dims = queries.padded_dim();
  const TiledB b{keys.columns + t.first_key * dims, kTileSize, dims / kPairs * kTileSize};
  multiply_amx(round_up(t.rows, kPairs), round_up(t.keys, kPairs), dims,
               queries.plain + t.row * dims, dims, b, t.dots, kDotStride, false);
}

/// Rows of values from `first` on, as B.
SVITT_INLINE TiledB values_of(const TileOperands& x, int64_t first) {
  const int dims = x.padded_dim();
  return {x.values + first * dims, dims / kTile * kTileSize, kTileSize};
}

/// 32 weights of a row in bf16, the first `count` of them, then zeros.
SVITT_INLINE __m512i round_some(const float* from, int count) {
  if (count <= 0) return _mm512_setzero_si512();
  const __mmask32 some = count < 32 ? (1u << count) - 1 : ~0u;
  const __m512 low = reinterpret_cast<__m512>(load(from)),
               high = reinterpret_cast<__m512>(load(from + W));
  return (__m512i)_mm512_maskz_cvtne2ps_pbh(some, high, low);
}

/// Rows of weights (rows, kGradStride) in bf16 with zeros up to multiples of 32, as rows `to_step`
/// apart and, unless null, transposed.
SVITT_INLINE void round_weights(const float* weights, int rows, int keys, uint16_t* to,
                                int64_t to_step, uint16_t* transposed) {
  constexpr __mmask32 kOdd = 0xaaaaaaaa;
  for (int r = 0; r < rows; r += kTileRows)
    for (int c = 0; c < keys; c += kPairs) {
      vf evens[W], odds[W];  // keys; of two rows each
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const int row = r + 2 * i;
        const float* from = weights + row * kGradStride + c;
        const __m512i first = round_some(from, row < rows ? keys - c : 0),
                      second = round_some(from + kGradStride, row + 1 < rows ? keys - c : 0);
        _mm512_storeu_si512(to + row * to_step + c, first);
        _mm512_storeu_si512(to + (row + 1) * to_step + c, second);
        evens[i] =
            (vf)_mm512_mask_blend_epi16(kOdd, first, _mm512_maskz_slli_epi32(0xffff, second, 16));
        odds[i] =
            (vf)_mm512_mask_blend_epi16(kOdd, _mm512_maskz_srli_epi32(0xffff, first, 16), second);
      }
      if (transposed == nullptr) continue;
      transpose(evens);
      transpose(odds);
      uint16_t* column = transposed + c * kSumStride + r;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i, column += 2 * kSumStride) {
        std::memcpy(column, &evens[i], 64);
        std::memcpy(column + kSumStride, &odds[i], 64);
      }
    }
}

SVITT_KERNELS_END
