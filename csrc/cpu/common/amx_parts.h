// fp32 on the matrix tiles: an operand is the sum of three bf16, its parts, and a product the sum
// of the six products of parts that fp32 can tell. Its error is below that of a chain of fp32
// multiply-adds; a value within 2^-9 of the largest float overflows, an infinity becomes a NaN, and
// a part below the smallest normal float is lost.
#pragma once

#include "pair_operand.h"
#include "simd.h"

SVITT_KERNELS_BEGIN

constexpr int kBlock = 2 * kTile * kPairs;  // values of a 32 x 32 block of B in bf16

/// Pairs (low[i], high[i]) as parts, each the rest after those before it rounded to bf16, stored
/// `step` apart. The last rest has no more than the 8 bits of a bf16; cut rather than rounded, it
/// keeps every NaN.
SVITT_INLINE void split_pairs(vf low, vf high, uint16_t* to, int64_t step) {
  typedef uint32_t vu __attribute__((vector_size(4 * W)));
  constexpr int kUpper = static_cast<int>(0xffff0000);
#pragma GCC unroll 3
  for (int part = 0; part < 3; ++part) {
    const int half = part < 2 ? 0x8000 : 0;
    const vi first = reinterpret_cast<vi>(low) + half;
    const vi second = (reinterpret_cast<vi>(high) + half) & kUpper;
    const vi pairs = reinterpret_cast<vi>(reinterpret_cast<vu>(first) >> 16) | second;
    std::memcpy(to + part * step, &pairs, 64);
    low -= reinterpret_cast<vf>(first & kUpper);
    high -= reinterpret_cast<vf>(second);
  }
}

/// 16 values of a row, or zeros where there is none.
SVITT_INLINE vf load_lanes(const float* row, int d) {
  return row == nullptr ? vf{} : load(row + d);
}

/// C += A B in the tile registers: A in parts, `a_part` apart, B one block of 3 x 2 tiles after
/// another, in the order of their use. With `Turned` the operands may change places and every sum
/// stays the same.
template <bool Turned>
SVITT_INLINE void multiply_parts(int steps, const uint16_t* a, int64_t a_stride, int64_t a_part,
                                 const uint16_t* b) {
  for (int k = 0; k < steps; ++k, a += kPairs, b += 3 * kBlock) {
    const auto load_a = [&](int part) __attribute__((always_inline)) {
      _tile_loadd(4, a + part * a_part, 2 * a_stride);
      _tile_loadd(5, a + part * a_part + kTile * a_stride, 2 * a_stride);
    };
    const auto load_b = [&](int part) __attribute__((always_inline)) {
      _tile_loadd(6, b + part * kBlock, 64);
      _tile_loadd(7, b + part * kBlock + kTile * kPairs, 64);
    };
    const auto add = [&]() __attribute__((always_inline)) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    };
    if constexpr (Turned) {
      load_a(0), load_b(2), add();
      load_b(0), add();
      load_b(1), add();
      load_a(1), add();
      load_b(0), add();
      load_a(2), add();
    } else {
      load_a(2), load_b(0), add();
      load_a(0), add();
      load_a(1), add();
      load_b(1), add();
      load_a(0), add();
      load_b(2), add();
    }
  }
}

/// A pair is two dims, or two rows, 16 apart.
template <>
struct Operand<float> {
  using Lane = float;
  static constexpr int kParts = 3;

  template <class Rows>
  static SVITT_INLINE void copy(const Rows& rows, int count, int dims, uint16_t* to, int64_t part) {
    for (int i = 0; i < count; ++i)
      for (int d = 0; d < dims; d += kPairs)
        split_pairs(load_lanes(rows(i), d), load_lanes(rows(i), d + W), to + i * dims + d, part);
  }
  template <class Rows>
  static SVITT_INLINE void pack_keys(const Rows& rows, int columns, int dims, uint16_t* to) {
    for (int i = 0; i < columns; i += kPairs)
      for (int d = 0; d < dims; d += kPairs, to += 3 * kBlock)
        for (int half = 0; half < 2; ++half)
          pack_columns([&](int r) { return load_lanes(rows(i + half * W + r % W), d + r / W * W); },
                       to + half * kTile * kPairs, kPairs, kBlock);
  }
  template <class Rows>
  static SVITT_INLINE void pack_values(const Rows& rows, int count, int dims, uint16_t* to) {
    for (int d = 0; d < dims; d += kPairs)
      for (int i = 0; i < count; i += kPairs, to += 3 * kBlock)
        for (int k = 0; k < kTile; ++k)
          for (int half = 0; half < 2; ++half)
            split_pairs(load_lanes(rows(i + k), d + half * W),
                        load_lanes(rows(i + k + kTile), d + half * W),
                        to + (half * kTile + k) * kPairs, kBlock);
  }
  /// 16 columns at `from` of 32 rows, as 16 rows of A.
  static SVITT_INLINE void pack_turned(const float* from, int64_t stride, uint16_t* to,
                                       int64_t to_stride, int64_t part) {
    pack_columns([&](int r) { return load(from + r * stride); }, to, to_stride, part);
  }
  /// Row k of `to`: lanes k of the vectors 0 to 15, paired with those of the vectors 16 to 31.
  template <class Vectors>
  static SVITT_INLINE void pack_columns(const Vectors& vectors, uint16_t* to, int64_t stride,
                                        int64_t part) {
    vf low[W], high[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) low[r] = vectors(r);
    transpose(low);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) high[r] = vectors(r + W);
    transpose(high);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) split_pairs(low[r], high[r], to + r * stride, part);
  }
  static SVITT_INLINE void store_pairs(vf low, vf high, uint16_t* to, int64_t part) {
    split_pairs(low, high, to, part);
  }
  template <bool Turned = false>
  static SVITT_INLINE void add_dims(TileSum&, const uint16_t* a, int64_t stride, int64_t part,
                                    const uint16_t* keys, int column, int dims) {
    multiply_parts<Turned>(dims / kPairs, a, stride, part,
                           keys + 3 * static_cast<int64_t>(column) * dims);
  }
  static SVITT_INLINE void add_rows(TileSum&, const uint16_t* a, int64_t stride, int64_t part,
                                    const uint16_t* values, int d, int depth, int) {
    multiply_parts<false>(depth / kPairs, a, stride, part,
                          values + 3 * static_cast<int64_t>(d) * depth);
  }
};

SVITT_KERNELS_END
