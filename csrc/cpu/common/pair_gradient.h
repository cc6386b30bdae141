// The products of `contrast_gradient.h` on pairs of bf16.
#pragma once

#include "pair_contrast.h"

#include "arena.h"
#include "contrast_gradient.h"

SVITT_KERNELS_BEGIN

template <class T>
struct PairGradientProducts {
  static constexpr int kStep = kPairRows;
  const TileRegisters registers;
  const ContrastGradient& p;
  int64_t start;         // of the chunk
  uint16_t* transposed;  // weights of a tile

  PairGradientProducts(const ContrastGradient& problem, int64_t chunk, Arena& arena)
      : p(problem),
        start(chunk * kQueryChunk),
        transposed(arena.take<uint16_t>(Operand<T>::kParts * kKeyTile * kSumStride)) {}
  void compute(DotTile& t) { compute_pairs<T>(t, p.tiled_queries, p.tiled_keys); }
  float* weights(const DotTile& t, int) { return t.dots; }
  void keep(const DotTile& t, int first) {
    keep_weights<T>(t.dots, t.rows, t.keys,
                    block_at<T>(p.rounded, t.tile * p.chunk_rows() + first, 0, kRoundedStride),
                    kRoundedStride, block_at<T>(transposed, 0, first, kSumStride));
  }
  void sum_keys(const DotTile& t, int queries) {
    const int step = p.padded_dim();
    multiply_pairs<T>(round_up(t.keys, kPairs), step, round_up(queries, kPairs), transposed,
                      kSumStride, values_of<T>(p.tiled_queries, start),
                      p.grad_keys + t.first_key * step, step, start > 0);
  }
};

/// Tiles [begin, end) of keys with a chunk of queries, as `weigh_tiles`.
template <template <class> class Products, class Weights, class P>
SVITT_INLINE void weigh_pairs(const P& p, int64_t chunk, int64_t begin, int64_t end) {
  with_pairs(p.dtype,
             [&](auto x) { weigh_tiles<Products<decltype(x)>, Weights>(p, chunk, begin, end); });
}

template <class T>
void sum_queries_of(const ContrastGradient& p, int64_t chunk, int first, int rows) {
  const TileRegisters registers;
  const int step = p.padded_dim();
  float* sums = p.grad_queries + static_cast<int64_t>(first) * step;
  for (int64_t tile = 0; tile < p.tiles(); ++tile) {
    const int64_t left = p.keys - tile * kKeyTile;
    const int keys = round_up(static_cast<int>(left < kKeyTile ? left : kKeyTile), kPairs);
    const int64_t row = tile * p.chunk_rows() + first;
    multiply_pairs<T>(rows, step, keys, block_at<T>(p.rounded, row, 0, kRoundedStride),
                      kRoundedStride, values_of<T>(p.tiled_keys, tile * kKeyTile), sums, step,
                      tile > 0);
  }
  const int64_t row = chunk * kQueryChunk + first, left = p.queries - row;
  write_rows(p, sums, p.grad_query, row, left < rows ? left : rows);
}

/// Blocks of 32 queries, those that begin within [begin, end).
inline void contrast_sum_queries_pairs(const ContrastGradient& p, int64_t chunk, int64_t begin,
                                       int64_t end) {
  const int first = round_up(static_cast<int>(begin), kTileRows),
            rows = round_up(static_cast<int>(end), kTileRows) - first;
  if (rows <= 0) return;
  with_pairs(p.dtype, [&](auto x) { sum_queries_of<decltype(x)>(p, chunk, first, rows); });
}

constexpr GradientKernels kPairGradient = {kPairPack, contrast_sum_queries_pairs,
                                           contrast_write_keys};

SVITT_KERNELS_END
