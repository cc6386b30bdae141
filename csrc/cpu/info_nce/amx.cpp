// InfoNCE for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx

#include "../common/amx_contrast.h"
#include "../common/contrast_tiles.h"
#include "../common/dispatch.h"
#include "backward.h"
#include "forward.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

static void contrast_forward_amx(const ContrastForward& p, int64_t chunk, int64_t begin,
                                 int64_t end) {
  const TileRegisters registers;
  forward_tiles<kAmxRows>(p, chunk, begin, end,
                          [&](DotTile& t) { compute_amx(t, p.tiled_queries, p.tiled_keys); });
}

static void contrast_backward_keys_amx(const ContrastBackward& p, int64_t chunk, int64_t begin,
                                       int64_t end) {
  const TileRegisters registers;
  const FlushDenormals flush;
  GradScratch s(kAmxRows);
  uint16_t* transposed = s.arena.take<uint16_t>(kKeyTile * kSumStride);
  const int64_t start = chunk * kQueryChunk, limit = chunk_end(p, chunk);
  const int queries = static_cast<int>(limit - start), step = p.padded_dim();
  s.load_totals(p.of_rows, p.queries, start, queries, s.row_high, s.row_low);
  for (int64_t tile = begin; tile < end; ++tile) {
    double grad_scale = chunk == 0 ? 0.0 : p.grad_scale[tile];
    DotTile t = dot_tile(p, chunk, start, tile, s.dots);
    if (p.of_columns != nullptr)
      s.load_totals(p.of_columns, p.keys, t.first_key, t.keys, s.key_high, s.key_low);
    for (int64_t row = start; row < limit; row += kAmxRows) {
      t = dot_tile(p, chunk, row, tile, s.dots, kAmxRows);
      compute_amx(t, p.tiled_queries, p.tiled_keys);
      const int first = static_cast<int>(row - start);
      grad_scale += weigh(p, t, first, s, t.dots);
      round_weights(t.dots, t.rows, t.keys,
                    p.rounded + (tile * p.chunk_rows() + first) * kRoundedStride, kRoundedStride,
                    transposed + first);
    }
    p.grad_scale[tile] = grad_scale;
    multiply_amx(round_up(t.keys, kPairs), step, round_up(queries, kPairs), transposed, kSumStride,
                 values_of(p.tiled_queries, start), p.grad_keys + t.first_key * step, step,
                 chunk > 0);
  }
}

/// Blocks of 32 queries, those that begin within [begin, end).
static void contrast_backward_queries_amx(const ContrastBackward& p, int64_t chunk, int64_t begin,
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

SVITT_KERNELS_END

SVITT_ADD_KERNELS(InfoNceKernels, {kTilePack, contrast_forward_amx, contrast_backward_keys_amx,
                                   contrast_backward_queries_amx, contrast_write_keys})
#endif
