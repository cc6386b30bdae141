// Forward for bf16 and fp32 on the AMX matrix tiles, and for bf16 by VDPBF16PS: the same sweep as
// forward.h with products of pairs, 32 rows at a time, or 28.
//
// Only the weights are rounded to bf16; logits, maximum, sum and accumulation stay in fp32.
// Tried without gain: prefetching tiles to the L1 cache, Q in tile registers throughout, results
// rounded by vectors; in fp32, huge pages for K and V in parts or for the result.
#pragma once

#include "../common/pair_attention.h"
#include "forward.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

constexpr int kTileColumns = kColumns + kPairs;
constexpr int kGroup = SVITT_TILES ? kTileRows : 2 * kRows;  // rows at a time

/// Rows of a tile: its tokens, its globals, then nothing.
template <class Lane>
struct TileRows {
  const Lane* data;
  int64_t stride;
  Tile tile;

  TileRows(const Matrix& m, int64_t b, int64_t h, const Tile& t)
      : data(base<Lane>(m, b, h)), stride(m.token), tile(t) {}
  const Lane* operator()(int i) const {
    if (i < tile.tokens) return data + (tile.first + i) * stride;
    i -= tile.tokens;
    return i < tile.globals ? data + (tile.first_global + i) * stride : nullptr;
  }
};

template <class T>
struct TileScratch : RowScratch {
  static constexpr int kParts = Operand<T>::kParts;
  Tiling tiling;
  // Tiles whose weights are made at once: in three parts, those of all would fill the L1 cache.
  int together;
  int64_t tile, query_part, weight_stride, weight_part;  // in bf16
  uint16_t *query, *keys, *values, *weights;
  float *logits, *out;

  explicit TileScratch(const Forward& p) : RowScratch(p), tiling(p, kPairs) {
    tile = static_cast<int64_t>(tiling.width) * p.head_dim * kParts;
    query_part = static_cast<int64_t>(round_up(static_cast<int>(rows), kTileRows)) * p.head_dim;
    together = kParts > 1 ? 1 : kColumns / tiling.width;
    weight_stride = kParts > 1 ? tiling.width : kTileColumns;
    weight_part = kTileRows * weight_stride;
    arena.take_all(tiling.tiles() * tile, keys, values);
    query = arena.take<uint16_t>(query_part * kParts);
    weights = arena.take<uint16_t>(weight_part * kParts);
    logits = arena.take<float>(kTileRows * kTileColumns);  // kGroup is at most kTileRows
    out = arena.take<float>(query_part);
  }
  void stage(const Forward& p, int64_t b, int64_t h) {
    using Rows = TileRows<typename Operand<T>::Lane>;
    tiling.length = static_cast<int>(p.length(b));
    for (int i = 0; i < tiling.tiles(); ++i) {
      const Tile t = tiling.tile(i);
      Operand<T>::pack_keys(Rows(p.key, b, h, t), tiling.width, p.head_dim, keys + i * tile);
#if SVITT_TILES
      Operand<T>::pack_values(Rows(p.value, b, h, t), tiling.width, p.head_dim, values + i * tile);
#else
      pack_row_pairs(Rows(p.value, b, h, t), tiling.width, p.head_dim, values + i * tile);
#endif
    }
  }
};

/// Weights exp(x - most) of one row as A; returns the sum of the weights before they are rounded.
template <class T>
SVITT_INLINE float exponentiate_pairs(const float* s, int columns, float most, uint16_t* weights,
                                      int64_t part) {
  vf sum{};
  for (int c = 0; c < columns; c += kPairs) {
    vf e[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const vf x = load(s + c + i * W);
      e[i] = Operand<T>::kParts > 1 ? exp_nonpositive(x - most)
                                    : exp2_bf16(x * kLog2e + splat(-kLog2e * most));
      sum += e[i];
    }
    Operand<T>::store_pairs(e[0], e[1], weights + c, part);
  }
  return hsum(sum);
}

/// Products of rows [r0, r0 + rows) with a tile of keys.
template <class T>
SVITT_INLINE void multiply_keys(const TileScratch<T>& s, int r0, int rows, const Entry& e,
                                int dims) {
  const uint16_t *query = s.query + static_cast<int64_t>(r0) * dims,
                 *keys = s.keys + e.tile * s.tile;
  float* to = s.logits + e.column;
#if SVITT_TILES
  (void)rows;
  for (int j = 0; j < s.tiling.width; j += kPairs) {
    TileSum sum(to + j, kTileColumns, false);
    Operand<T>::add_dims(sum, query, dims, s.query_part, keys, j, dims);
    sum.store();
  }
#else
  multiply(over_dims(query, dims, keys, dims), rows, s.tiling.width / W,
           store_sums(to, kTileColumns, false));
#endif
}

/// out = or += products of the weights with tiles of values.
template <class T>
SVITT_INLINE void multiply_values(const TileScratch<T>& s, int rows, const Entry* entry,
                                  int entries, int dims, float* out, bool add) {
  const int width = s.tiling.width;
#if SVITT_TILES
  (void)rows;
  for (int d = 0; d < dims; d += kPairs) {
    TileSum sum(out + d, dims, add);
    for (int k = 0; k < entries; ++k)
      Operand<T>::add_rows(sum, s.weights + k * width, s.weight_stride, s.weight_part,
                           s.values + entry[k].tile * s.tile, d, width, dims);
    sum.store();
  }
#else
  for (int k = 0; k < entries; ++k)
    multiply(over_rows(s.weights + k * width, s.weight_stride, 2, s.values + entry[k].tile * s.tile,
                       entry[k].to, dims),
             rows, dims / W, store_sums(out, dims, add || k > 0));
#endif
}

template <class T>
void forward_block(const Forward& p, RowBlock& block, TileScratch<T>& s) {
  using Lane = typename Operand<T>::Lane;
  const int dims = p.head_dim;
  const float* table = p.table == nullptr ? nullptr : p.table + block.h * p.table_stride;
  Chunk& chunk = *s.chunk;
  Operand<T>::copy(some_rows<Lane>(p.query, block.b, block.h, block.row, block.rows),
                   round_up(block.rows, kTileRows), dims, s.query, s.query_part);
  for (int r = 0; r < block.rows; ++r) s.sum[r] = 0.0f;
  if (table != nullptr && block.rows > 0) s.bias->bind(p, block.b);

  for (bool first = true; block.rows > 0 && block.gather(s.tiling, chunk); first = false) {
    if (table != nullptr) s.bias->describe(chunk);
    for (int r0 = 0; r0 < block.rows; r0 += kGroup) {
      const int rows = block.rows - r0 < kGroup ? block.rows - r0 : kGroup;
      float* out = s.out + static_cast<int64_t>(r0) * dims;
      for (int i = 0; i < chunk.entries; ++i) multiply_keys(s, r0, rows, chunk.entry[i], dims);
      float most[kGroup];
      for (int r = 0; r < rows; ++r) {
        prefetch_neighbours<T>(p, block, r0 + r);
        if constexpr (Operand<T>::kParts == 1) prefetch_head<T>(p, block, r0 + r);
        most[r] = finish_logits(p, block, chunk, *s.bias, table, block.row + r0 + r,
                                s.logits + r * kTileColumns);
      }
      if (r0 == 0) keep_saliency(p, block, chunk, s.logits);
      for (int r = 0; r < rows; ++r)
        s.sum[r0 + r] *= advance(most[r], first, s.most + r0 + r, out + r * dims, dims);
      for (int i = 0; i < chunk.entries; i += s.together) {
        const int left = chunk.entries - i, entries = left < s.together ? left : s.together;
        const int from = chunk.entry[i].column, columns = entries * s.tiling.width;
        for (int r = 0; r < rows; ++r)
          s.sum[r0 + r] +=
              exponentiate_pairs<T>(s.logits + r * kTileColumns + from, columns, s.most[r0 + r],
                                    s.weights + r * s.weight_stride, s.weight_part);
        multiply_values(s, rows, chunk.entry + i, entries, dims, out, !first || i > 0);
      }
    }
  }
  write_results<T>(p, block, s.tiling.length, s.out, dims, s);
}

inline void forward_pairs(const Forward& p, int64_t begin, int64_t end) {
  const TileRegisters registers;
#if SVITT_TILES
  if (p.dtype == Dtype::f32) return forward_items<TileScratch<float>>(p, begin, end);
#endif
  forward_items<TileScratch<bf16>>(p, begin, end);
}

SVITT_KERNELS_END
