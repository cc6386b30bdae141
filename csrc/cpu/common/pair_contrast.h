// The contrastive ops on pairs of bf16: the same sweeps with all products on the matrix tiles, or
// on vectors where there are none. On tiles fp32 comes too, in parts (amx_parts.h).
//
// Similarities of bf16 are sums of exact products in fp32, as elsewhere. The weights are rounded to
// bf16 once, for the two products that sum rows; all else, the temperature's gradient too, takes
// them as they are. On the tests' cases that leaves nine tenths of the error budget, so they are
// not split into two bf16 each.
//
// Tried, without effect beyond noise: 32 or 128 queries at a time, chunks of 256 queries, sums of
// 512 without storing between; of parts, sums of 128 or 256.
//
// Where a VDPBF16PS starts every second cycle only, as on a Sapphire Rapids without its tiles, fp32
// multiply-adds of widened bf16 take 0.7 of the time.
#pragma once

#include "pair_operand.h"
#if SVITT_TILES
#include "amx_parts.h"
#endif
#include "arena.h"
#include "contrast.h"
#include "contrast_tiles.h"

SVITT_KERNELS_BEGIN

constexpr int kPairRows = 64;  // queries at a time: with the keys of one step they fit the L1 cache
constexpr int64_t kTileSize = kTile * kPairs;
static_assert(kGradStride == kDotStride);  // weights take the place of similarities

/// How far a sum goes before its rows change, so that they and the keys stay in the L1 cache.
template <class T>
constexpr int kPairDepth = Operand<T>::kParts == 1 ? 256 : 64;

/// Calls `visit` with some value of the dtype, one that is multiplied in pairs.
template <class Visit>
SVITT_INLINE void with_pairs([[maybe_unused]] Dtype dtype, const Visit& visit) {
#if SVITT_TILES
  if (dtype == Dtype::f32) return visit(float{});
#endif
  visit(bf16{});
}

inline bool takes_pairs(const Contrast& p) {
  return p.dtype == Dtype::bf16 || (SVITT_TILES && p.dtype == Dtype::f32);
}

/// Where row i and place k of an operand A begin, both multiples of 32. Its rows are `stride`
/// apart; parts stand in blocks of 32 x 32, so that those of one step are a few whole pages of the
/// cache.
template <class T, class U>
SVITT_INLINE U* block_at(U* a, int64_t i, int64_t k, int64_t stride) {
  return Operand<T>::kParts == 1 ? a + i * stride + k
                                 : a + Operand<T>::kParts * (i * stride + kTileRows * k);
}

/// B of a product: its tiles, `step` apart along the sum and `next` along the columns.
struct TiledB {
  const uint16_t* data;
  int64_t step, next;
};

SVITT_INLINE void add_product(bf16, TileSum& sum, int steps, const uint16_t* a, int64_t a_stride,
                              TiledB b) {
  sum.add(steps, a, a_stride, b.data, b.step, b.next);
}
#if SVITT_TILES
SVITT_INLINE void add_product(float, TileSum&, int steps, const uint16_t* a, int64_t a_stride,
                              TiledB b) {
  for (int k = 0; k < steps; ++k)
    multiply_parts<false>(1, block_at<float>(a, 0, k * kPairs, a_stride), kPairs, kBlock,
                          b.data + k * b.step);
}
#endif

/// C (rows x columns) = or += A B; all sizes are multiples of 32.
template <class T>
void multiply_pairs(int rows, int columns, int depth, const uint16_t* a, int64_t a_stride, TiledB b,
                    float* c, int64_t c_stride, bool add) {
  for (int k = 0; k < depth; k += kPairDepth<T>) {
    const int left = depth - k, steps = (left < kPairDepth<T> ? left : kPairDepth<T>) / kPairs;
    for (int first = 0; first < rows; first += kPairRows)
      for (int j = 0; j < columns; j += kPairs) {
        const TiledB part{b.data + k / kPairs * b.step + j / kTile * b.next, b.step, b.next};
        for (int i = first; i < rows && i < first + kPairRows; i += kTileRows) {
          TileSum sum(c + i * c_stride + j, c_stride, add || k > 0);
          add_product(T{}, sum, steps, block_at<T>(a, i, k, a_stride), a_stride, part);
          sum.store();
        }
      }
  }
}

/// 32 rows as A.
SVITT_INLINE void copy_operand(const uint16_t* rows, int64_t step, int dims, uint16_t* to) {
  copy_pairs([&](int r) { return rows + r * step; }, kTileRows, dims, to);
}
#if SVITT_TILES
SVITT_INLINE void copy_operand(const float* rows, int64_t step, int dims, uint16_t* to) {
  for (int d = 0; d < dims; d += kPairs)
    Operand<float>::copy([&](int r) { return rows + r * step + d; }, kTileRows, kPairs,
                         block_at<float>(to, 0, d, dims), kBlock);
}
#endif

/// Groups of rows; `copy` (32, padded dim) is for those that cannot be read in place.
template <class T>
void pack_operands(const TileOperands& to, int64_t begin, int64_t end,
                   typename Operand<T>::Lane* copy) {
  using Lane = typename Operand<T>::Lane;
  const int dims = to.padded_dim();
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kTileRows, left = to.count - first,
                  at = Operand<T>::kParts * first * dims;
    const int rows = static_cast<int>(left < kTileRows ? left : kTileRows);
    const Lane* from = row_of<Lane>(to.data, to.step, first);
    int64_t step = to.step;
    if (rows < kTileRows || dims != to.dim) {
      std::memset(copy, 0, sizeof(Lane) * kTileRows * dims);
      for (int r = 0; r < rows; ++r)
        std::memcpy(copy + r * dims, from + r * step, sizeof(Lane) * to.dim);
      from = copy, step = dims;
    }
    const auto row = [&](int r) { return from + r * step; };
    if (to.plain != nullptr) copy_operand(from, step, dims, to.plain + at);
    if (to.columns != nullptr) Operand<T>::pack_keys(row, kTileRows, dims, to.columns + at);
    if (to.values != nullptr) Operand<T>::pack_values(row, kTileRows, dims, to.values + at);
  }
}

inline void contrast_pack_pairs(const TileOperands& to, int64_t begin, int64_t end) {
  with_pairs(to.dtype, [&](auto x) {
    using T = decltype(x);
    Arena arena;
    auto* copy = arena.take<typename Operand<T>::Lane>(kTileRows * to.padded_dim());
    pack_operands<T>(to, begin, end, copy);
  });
}

constexpr PackKernels kPairPack = {takes_pairs, contrast_pack_queries, contrast_pack_keys,
                                   contrast_pack_pairs};

/// Similarities of some queries, from a multiple of 32 on, with a tile of packed keys.
template <class T>
void compute_pairs(const DotTile& t, const TileOperands& queries, const TileOperands& keys) {
  constexpr int kParts = Operand<T>::kParts;
  const int dims = queries.padded_dim();
  // The two tiles of a block are side by side in parts, else one sum apart.
  const TiledB b{keys.columns + kParts * t.first_key * dims,
                 kParts == 1 ? kTileSize : 2 * kParts * kTileSize,
                 dims / kPairs * kParts * kTileSize};
  multiply_pairs<T>(round_up(t.rows, kPairs), round_up(t.keys, kPairs), dims,
                    block_at<T>(queries.plain, t.row, 0, dims), dims, b, t.dots, kDotStride, false);
}

/// Blocks of 32 queries, those that begin within [begin, end): calls `search(first, last,
/// compute)`, where `compute` makes the similarities of a tile.
template <class Search>
SVITT_INLINE void search_pairs(const Contrast& p, int64_t begin, int64_t end,
                               const Search& search) {
  const TileRegisters registers;
  const int64_t first = (begin + kTileRows - 1) / kTileRows * kTileRows,
                limit = (end + kTileRows - 1) / kTileRows * kTileRows;
  with_pairs(p.dtype, [&](auto x) {
    search(first, limit < p.queries ? limit : p.queries,
           [&](const DotTile& t) { compute_pairs<decltype(x)>(t, p.tiled_queries, p.tiled_keys); });
  });
}

/// Rows of values from `first` on, as B.
template <class T>
SVITT_INLINE TiledB values_of(const TileOperands& x, int64_t first) {
  constexpr int kParts = Operand<T>::kParts;
  const int dims = x.padded_dim();
  return {x.values + kParts * first * dims, dims / kTile * kParts * kTileSize, kParts * kTileSize};
}

/// 32 weights of a row in bf16, the first `count` of them, then zeros.
SVITT_INLINE __m512i round_some(const float* from, int count) {
  if (count <= 0) return _mm512_setzero_si512();
  const __mmask32 some = count < 32 ? (1u << count) - 1 : ~0u;
  const __m512 low = reinterpret_cast<__m512>(load(from)),
               high = reinterpret_cast<__m512>(load(from + W));
  return (__m512i)_mm512_maskz_cvtne2ps_pbh(some, high, low);
}

/// A block of 32 rows of 32 weights, of which (rows, keys) exist, in bf16 and, unless null,
/// transposed.
SVITT_INLINE void keep_block(bf16, const float* weights, int rows, int keys, uint16_t* to,
                             int64_t to_step, uint16_t* transposed) {
  constexpr __mmask32 kOdd = 0xaaaaaaaa;
  vf evens[W], odds[W];  // keys; of two rows each
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    const int row = 2 * i;
    const float* from = weights + row * kGradStride;
    const __m512i first = round_some(from, row < rows ? keys : 0),
                  second = round_some(from + kGradStride, row + 1 < rows ? keys : 0);
    _mm512_storeu_si512(to + row * to_step, first);
    _mm512_storeu_si512(to + (row + 1) * to_step, second);
    evens[i] =
        (vf)_mm512_mask_blend_epi16(kOdd, first, _mm512_maskz_slli_epi32(0xffff, second, 16));
    odds[i] = (vf)_mm512_mask_blend_epi16(kOdd, _mm512_maskz_srli_epi32(0xffff, first, 16), second);
  }
  if (transposed == nullptr) return;
  transpose(evens);
  transpose(odds);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i, transposed += 2 * kSumStride) {
    std::memcpy(transposed, &evens[i], 64);
    std::memcpy(transposed + kSumStride, &odds[i], 64);
  }
}

#if SVITT_TILES
/// The same in parts.
SVITT_INLINE void keep_block(float, const float* weights, int rows, int keys, uint16_t* to, int64_t,
                             uint16_t* transposed) {
  const auto some = [&](int r, int half) __attribute__((always_inline)) {
    const int count = r < rows ? keys - half * W : 0;
    return lane_numbers() < count ? load(weights + r * kGradStride + half * W) : vf{};
  };
  for (int r = 0; r < kTileRows; ++r) split_pairs(some(r, 0), some(r, 1), to + r * kPairs, kBlock);
  if (transposed == nullptr) return;
  for (int half = 0; half < 2; ++half)
    Operand<float>::pack_columns([&](int r) { return some(r, half); },
                                 transposed + half * W * kPairs, kPairs, kBlock);
}
#endif

/// Rows of weights (rows, kGradStride) as operands with zeros up to multiples of 32, rows `to_step`
/// apart, and, unless null, transposed.
template <class T>
void keep_weights(const float* weights, int rows, int keys, uint16_t* to, int64_t to_step,
                  uint16_t* transposed) {
  for (int r = 0; r < rows; r += kTileRows)
    for (int c = 0; c < keys; c += kPairs)
      keep_block(T{}, weights + r * kGradStride + c, rows - r, keys - c,
                 block_at<T>(to, r, c, to_step), to_step,
                 transposed == nullptr ? nullptr : block_at<T>(transposed, c, r, kSumStride));
}

SVITT_KERNELS_END
