// The products of `contrast_gradient.h` for bf16 on the AMX matrix tiles.
#pragma once

#include "amx_contrast.h"
#include "arena.h"
#include "contrast_gradient.h"

SVITT_KERNELS_BEGIN

struct TiledGradientProducts {
  static constexpr int kStep = kAmxRows;
  const TileRegisters registers;
  const ContrastGradient& p;
  int64_t start;         // of the chunk
  uint16_t* transposed;  // weights of a tile

  TiledGradientProducts(const ContrastGradient& problem, int64_t chunk, Arena& arena)
      : p(problem),
        start(chunk * kQueryChunk),
        transposed(arena.take<uint16_t>(kKeyTile * kSumStride)) {}
  void compute(DotTile& t) { compute_amx(t, p.tiled_queries, p.tiled_keys); }
  float* weights(const DotTile& t, int) { return t.dots; }
  void keep(const DotTile& t, int first) {
    round_weights(t.dots, t.rows, t.keys,
                  p.rounded + (t.tile * p.chunk_rows() + first) * kRoundedStride, kRoundedStride,
                  transposed + first);
  }
  void sum_keys(const DotTile& t, int queries) {
    const int step = p.padded_dim();
    multiply_amx(round_up(t.keys, kPairs), step, round_up(queries, kPairs), transposed, kSumStride,
                 values_of(p.tiled_queries, start), p.grad_keys + t.first_key * step, step,
                 start > 0);
  }
};

/// Blocks of 32 queries, those that begin within [begin, end).
inline void contrast_sum_queries_amx(const ContrastGradient& p, int64_t chunk, int64_t begin,
                                     int64_t end) {
  const int first = round_up(static_cast<int>(begin), kTileRows), step = p.padded_dim(),
            rows = round_up(static_cast<int>(end), kTileRows) - first;
  if (rows <= 0) return;
  const TileRegisters registers;
  float* sums = p.grad_queries + static_cast<int64_t>(first) * step;
  for (int64_t tile = 0; tile < p.tiles(); ++tile) {
    const int64_t left = p.keys - tile * kKeyTile;
    const int keys = round_up(static_cast<int>(left < kKeyTile ? left : kKeyTile), kPairs);
    multiply_amx(rows, step, keys, p.rounded + (tile * p.chunk_rows() + first) * kRoundedStride,
                 kRoundedStride, values_of(p.tiled_keys, tile * kKeyTile), sums, step, tile > 0);
  }
  const int64_t row = chunk * kQueryChunk + first, left = p.queries - row;
  write_rows(p, sums, p.grad_query, row, left < rows ? left : rows);
}

constexpr GradientKernels kTiledGradient = {kTilePack, contrast_sum_queries_amx,
                                            contrast_write_keys};

SVITT_KERNELS_END
