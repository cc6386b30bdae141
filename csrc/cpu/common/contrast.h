// What the contrastive ops hand to their kernels alike.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace svitt {

constexpr int kKeyTile = 256;                  // keys whose columns one thread owns
constexpr int kQueryChunk = 512;               // queries between two reductions
constexpr int kWidest = 32;                    // the widest panel of any instruction set
constexpr int kGradStride = kKeyTile + 16;     // not a power of two: rows fall into different sets
constexpr int kRoundedStride = kKeyTile + 32;  // the same for weights in bf16, in whole lines
constexpr int kSumStride = kQueryChunk + 32;   // and for their transpose

// Log-sum-exp of the negatives as maximum and sum, the same of the positives, and plain sums;
// `same` and `weight` of the positives, by their weights.
struct Tally {
  double positive_most;  // positives are few, and exact
  float most, sum, positive_sum, same, every, weight;
  int32_t count;
};

/// Rows as operands of products of bf16 pairs, in groups of 32, padded with zeros to 32 rows and
/// dims; fp32 in three parts. What is not wanted is null.
struct TileOperands {
  Dtype dtype;
  const void* data;
  int64_t step, count;
  int dim;
  uint16_t* plain;    // A
  uint16_t* columns;  // B of similarities
  uint16_t* values;   // B of weighted sums of rows

  int64_t groups() const { return (count + 31) / 32; }
  int padded_dim() const { return (dim + 31) / 32 * 32; }
};

/// How many bf16 such an operand has for each value.
inline int parts_of(Dtype dtype) { return dtype == Dtype::f32 ? 3 : 1; }

struct Contrast {
  Dtype dtype;
  int64_t queries, keys;
  int dim;
  const void *query, *key;  // rows `query_step` and `key_step` apart
  int64_t query_step, key_step;
  const int32_t *query_ids, *key_ids;        // or null: query i belongs to key first_row + i
  const float *query_weights, *key_weights;  // of positives; or null: all 1
  int64_t first_row;
  float scale;
  float limit;  // of similarities, see `set_temperature`
  bool symmetric, smooth;

  // Packed to fp32. `rows`: queries as they are. `columns`: tiles of keys, transposed.
  float *rows, *columns;
  int64_t row_step;
  // Instead of those where the dtype is multiplied in pairs of bf16.
  TileOperands tiled_queries, tiled_keys;

  int64_t tiles() const { return (keys + kKeyTile - 1) / kKeyTile; }
  int64_t chunks() const { return (queries + kQueryChunk - 1) / kQueryChunk; }
  int64_t padded_keys() const { return (keys + kWidest - 1) / kWidest * kWidest; }
  int64_t padded_queries() const { return (queries + 31) / 32 * 32; }
  int64_t chunk_rows() const {  // room for one chunk
    return padded_queries() < kQueryChunk ? padded_queries() : kQueryChunk;
  }
  int padded_dim() const { return (dim + kWidest - 1) / kWidest * kWidest; }
};

/// What every table of a contrastive op begins with. As in all of them, items are independent of
/// each other: any split over threads gives the same bits.
struct PackKernels {
  bool (*takes)(const Contrast& p);
  void (*queries)(const Contrast& p, float* panels, int64_t begin, int64_t end);
  void (*keys)(const Contrast& p, float* panels, int64_t begin, int64_t end);
  void (*tiles)(const TileOperands& to, int64_t begin, int64_t end);  // groups of 32 rows; or null
};

/// A weight of each similarity in the gradient: queries are summed over the keys, and keys over the
/// queries. Where nobody wants it, `grad_query` and all memory for it are null.
struct ContrastGradient : Contrast {
  float factor;  // of the result
  // `query_panels`, `key_panels`: rows cut into panels of dims, B of products that sum over rows.
  float *query_panels, *key_panels;
  float* grads;                     // (tiles, chunk_rows, kGradStride) of the current chunk
  uint16_t* rounded;                // or (tiles, chunk_rows, kRoundedStride), in bf16 or parts
  float *grad_keys, *grad_queries;  // (padded keys, padded dim), (chunk_rows, padded dim)
  void *grad_query, *grad_key;      // contiguous
  Dtype grad_dtype;
};

/// With the op's own kernel, which weighs a chunk's similarities and sums its keys.
struct GradientKernels : PackKernels {
  void (*sum_queries)(const ContrastGradient& p, int64_t chunk, int64_t begin, int64_t end);
  void (*write_keys)(const ContrastGradient& p, int64_t begin, int64_t end);
};

struct ContrastSearch : Contrast {
  const double* uniform;  // (queries), or null
  int64_t* found;         // (queries), one of the keys or a rank
};

struct SearchKernels : PackKernels {
  void (*find)(const ContrastSearch& p, int64_t begin, int64_t end);
};
struct SampleKernels : SearchKernels {};
struct RankKernels : SearchKernels {};

}  // namespace svitt
