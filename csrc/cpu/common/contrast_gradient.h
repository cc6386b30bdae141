// Gradients that weigh every similarity: the weights of a chunk of queries with all tiles of keys,
// and two products with them.
#pragma once

#include "arena.h"
#include "contrast_tiles.h"

SVITT_KERNELS_BEGIN

constexpr int kSummedTiles = 4;  // tiles of keys whose weights stay in the L2 cache together

/// Products in fp32, for a chunk of queries.
struct GradientProducts {
  static constexpr int kStep = kDotRows;
  const ContrastGradient& p;
  int64_t start;  // of the chunk

  GradientProducts(const ContrastGradient& problem, int64_t chunk, Arena&)
      : p(problem), start(chunk * kQueryChunk) {}
  void compute(DotTile& t) { t.compute(p); }
  /// Where the weights of rows from `first` of the chunk on belong, kGradStride apart.
  float* weights(const DotTile& t, int first) {
    return p.grads + (t.tile * p.chunk_rows() + first) * kGradStride;
  }
  void keep(const DotTile&, int) {}
  /// The tile's keys take in the chunk's queries.
  void sum_keys(const DotTile& t, int queries) {
    float* rows[kKeyTile];
    for (int panel = 0; panel * kPanel < p.dim; ++panel) {
      for (int j = 0; j < t.keys; ++j)
        rows[j] = p.grad_keys + (t.first_key + j) * p.padded_dim() + panel * kPanel;
      const float* b = p.query_panels + (panel * p.queries + start) * kPanel;
      multiply_pieces(t.keys, weights(t, 0), {1, kGradStride}, b, queries, rows, start > 0);
    }
  }
};

/// Tiles [begin, end) of keys with a chunk of queries: their weights, and the keys' gradient from
/// them. `Weights` says what similarities weigh, and keeps what else they amount to.
template <class Products, class Weights, class P>
SVITT_INLINE void weigh_tiles(const P& p, int64_t chunk, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  Arena arena;
  float* dots = arena.take<float>(Products::kStep * kDotStride);
  Products products(p, chunk, arena);
  Weights weights(p, chunk, arena, Products::kStep);
  const bool gradients = p.grad_query != nullptr;
  const int64_t start = chunk * kQueryChunk, limit = chunk_end(p, chunk);
  for (int64_t tile = begin; tile < end; ++tile) {
    DotTile t = dot_tile(p, chunk, start, tile, dots);
    weights.begin(t);
    for (int64_t row = start; row < limit; row += Products::kStep) {
      const int first = static_cast<int>(row - start);
      t = dot_tile(p, chunk, row, tile, dots, Products::kStep);
      products.compute(t);
      weights.weigh(t, first, gradients ? products.weights(t, first) : nullptr);
      if (gradients) products.keep(t, first);
    }
    weights.end(t);
    if (gradients) products.sum_keys(t, static_cast<int>(limit - start));
  }
}

inline void write_rows(const ContrastGradient& p, const float* from, void* to, int64_t row,
                       int64_t rows) {
  with_type(p.grad_dtype, [&](auto x) {
    auto* first = static_cast<decltype(x)*>(to) + row * p.dim;
    for (int64_t r = 0; r < rows; ++r)
      write_row(first + r * p.dim, from + r * p.padded_dim(), p.dim, p.factor);
  });
}

/// The gradient of queries [begin, end) of a chunk, from the weights of all tiles.
inline void contrast_sum_queries(const ContrastGradient& p, int64_t chunk, int64_t begin,
                                 int64_t end) {
  const int count = static_cast<int>(end - begin), step = p.padded_dim();
  float* rows[kQueryChunk];
  for (int64_t first = 0; first < p.tiles(); first += kSummedTiles)
    for (int panel = 0; panel * kPanel < p.dim; ++panel) {
      for (int r = 0; r < count; ++r)
        rows[r] = p.grad_queries + (begin + r) * step + panel * kPanel;
      for (int64_t tile = first; tile < p.tiles() && tile < first + kSummedTiles; ++tile) {
        const int64_t left = p.keys - tile * kKeyTile;
        multiply_pieces(count, p.grads + (tile * p.chunk_rows() + begin) * kGradStride,
                        {kGradStride, 1},
                        p.key_panels + (panel * p.padded_keys() + tile * kKeyTile) * kPanel,
                        static_cast<int>(left < kKeyTile ? left : kKeyTile), rows, tile > 0);
      }
    }
  write_rows(p, p.grad_queries + begin * step, p.grad_query, chunk * kQueryChunk + begin, count);
}

inline void contrast_write_keys(const ContrastGradient& p, int64_t begin, int64_t end) {
  write_rows(p, p.grad_keys + begin * p.padded_dim(), p.grad_key, begin, end - begin);
}

constexpr GradientKernels kGradient = {kPack, contrast_sum_queries, contrast_write_keys};

SVITT_KERNELS_END
