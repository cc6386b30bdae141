// Operands of products of bf16 pairs, as attention has them.
#pragma once

#include "pair_tiles.h"

SVITT_KERNELS_BEGIN

/// How operands of a dtype stand in memory, and the 32 x 32 block of C in the tile registers.
///
/// `copy` makes A of rows, `store_pairs` A of 32 sums, `pack_keys` B of a product over dims,
/// `pack_values` B of one over rows; rows are given as in pair_tiles.h. The parts of A are `part`
/// apart.
template <class T>
struct Operand;

template <>
struct Operand<bf16> {
  using Lane = uint16_t;
  static constexpr int kParts = 1;

  template <class Rows>
  static SVITT_INLINE void copy(const Rows& rows, int count, int dims, uint16_t* to, int64_t) {
    copy_pairs(rows, count, dims, to);
  }
  template <class Rows>
  static SVITT_INLINE void pack_keys(const Rows& rows, int columns, int dims, uint16_t* to) {
    pack_key_tiles(rows, columns, dims, to);
  }
  template <class Rows>
  static SVITT_INLINE void pack_values(const Rows& rows, int count, int dims, uint16_t* to) {
    pack_value_tiles(rows, count, dims, to);
  }
  static SVITT_INLINE void store_pairs(vf low, vf high, uint16_t* to, int64_t) {
    _mm512_storeu_si512(to, round_pairs(low, high));
  }
  /// C += A B over dims, columns from `column`.
  template <bool Turned = false>
  static SVITT_INLINE void add_dims(TileSum& sum, const uint16_t* a, int64_t stride, int64_t,
                                    const uint16_t* keys, int column, int dims) {
    const int64_t group = static_cast<int64_t>(dims) * kTile;
    sum.add(dims / kPairs, a, stride, keys + column / kTile * group, kTile * kPairs, group);
  }
  /// C += A B over `depth` rows, dims from d.
  static SVITT_INLINE void add_rows(TileSum& sum, const uint16_t* a, int64_t stride, int64_t,
                                    const uint16_t* values, int d, int depth, int dims) {
    const int64_t tile = kTile * kPairs;
    sum.add(depth / kPairs, a, stride, values + d / kTile * tile, dims / kTile * tile, tile);
  }
};

SVITT_KERNELS_END
