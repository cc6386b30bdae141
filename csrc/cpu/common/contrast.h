// What the dispatcher hands to the InfoNCE kernels of each instruction set.
#pragma once

#include <cstdint>

#include "attention.h"

namespace svitt {

constexpr int kKeyTile = 256;                  // keys whose columns one thread owns
constexpr int kQueryChunk = 512;               // queries between two reductions
constexpr int kWidest = 32;                    // the widest panel of any instruction set
constexpr int kGradStride = kKeyTile + 16;     // not a power of two: rows fall into different sets
constexpr int kRoundedStride = kKeyTile + 32;  // the same for weights in bf16, in whole lines
constexpr int kSumStride = kQueryChunk + 32;   // and for their transpose

// Log-sum-exp of the negatives as maximum and sum, the same of the positives, and plain sums.
struct Tally {
  double positive_most;  // positives are few, and exact
  float most, sum, positive_sum, same, every;
  int32_t count;
};

/// bf16 rows as operands of the matrix tiles, in groups of 32, padded with zeros to 32 rows and
/// dims. What is not wanted is null.
struct TileOperands {
  const void* data;
  int64_t step, count;
  int dim;
  uint16_t* plain;    // A
  uint16_t* columns;  // B of similarities
  uint16_t* values;   // B of weighted sums of rows

  int64_t groups() const { return (count + 31) / 32; }
  int padded_dim() const { return (dim + 31) / 32 * 32; }
};

struct Contrast {
  Dtype dtype;
  int64_t queries, keys;
  int dim;
  const void *query, *key;  // rows `query_step` and `key_step` apart
  int64_t query_step, key_step;
  const int32_t *query_ids, *key_ids;  // or null: query i belongs to key first_row + i
  int64_t first_row;
  float scale;
  float limit;  // of similarities, see `set_temperature`
  bool symmetric, smooth;

  // Packed to fp32. `rows`: queries as they are. `columns`: tiles of keys, transposed.
  float *rows, *columns;
  int64_t row_step;
  // Instead of those where the processor has matrix tiles for the dtype.
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

struct ContrastForward : Contrast {
  Tally* row_parts;  // (tiles, chunk_rows) of the current chunk
  Tally* of_keys;    // (keys), over all chunks so far
};

struct ContrastBackward : Contrast {
  // Statistics of the forward, (5, queries) and (5, keys); `of_columns` null in one direction.
  const double *of_rows, *of_columns;
  float centre;     // a typical similarity, see `weigh`
  float smoothing;  // label smoothing over the number of choices
  float label_smoothing;
  float factor;  // of the result: upstream gradient, mean, scale

  // `query_panels`, `key_panels`: rows cut into panels of dims, B of products that sum over rows.
  float *query_panels, *key_panels;
  float* grads;                     // (tiles, chunk_rows, kGradStride) of the current chunk
  uint16_t* rounded;                // or (tiles, chunk_rows, kRoundedStride), in bf16
  double* grad_scale;               // (tiles)
  float *grad_keys, *grad_queries;  // (padded keys, padded dim), (chunk_rows, padded dim)
  void *grad_query, *grad_key;      // contiguous
  Dtype grad_dtype;
};

struct ContrastSearch : Contrast {
  const double* uniform;  // (queries), or null
  int64_t* found;         // (queries)
};

/// Sums over the negatives of one distribution: exp(logit - most), and that times the similarity.
/// Logits and similarities are taken from those of the query's own pair.
struct SoftSum {
  double most;
  float sum, moment;
};
struct QueueTally {
  SoftSum student, teacher;
};

struct ContrastQueue : Contrast {
  const void* queue;
  int64_t queue_rows, queue_step;
  const int32_t* queue_ids;  // or null: no positives
  const float* teacher;      // queries of the other distribution, fp32; or null
  int64_t teacher_step;
  TileOperands tiled_teacher;
  double alpha;
  bool gradients;
  int64_t splits;  // of the candidates

  float *centres, *teacher_centres;  // (queries), similarity of the own pair
  QueueTally* tallies;               // (splits, queries)
  float* sums;                       // (splits, distributions, padded queries, padded dim)
  float* grad;                       // (queries, dim)
  double *losses, *moments;          // (queries)

  int64_t all_tiles() const { return tiles() + (queue_rows + kKeyTile - 1) / kKeyTile; }
  int distributions() const { return teacher == nullptr ? 1 : 2; }
};

// Every function works on independent items: any split over threads gives the same bits.
#define SVITT_DECLARE(ISA) \
  namespace ISA { \
  void contrast_pack_queries(const Contrast& p, float* panels, int64_t begin, int64_t end); \
  void contrast_pack_keys(const Contrast& p, float* panels, int64_t begin, int64_t end); \
  void contrast_forward(const ContrastForward& p, int64_t chunk, int64_t begin, int64_t end); \
  void contrast_backward_keys(const ContrastBackward& p, int64_t chunk, int64_t begin, \
                              int64_t end); \
  void contrast_backward_queries(const ContrastBackward& p, int64_t chunk, int64_t begin, \
                                 int64_t end); \
  void contrast_write_keys(const ContrastBackward& p, int64_t begin, int64_t end); \
  void contrast_sample(const ContrastSearch& p, int64_t begin, int64_t end); \
  void contrast_rank(const ContrastSearch& p, int64_t begin, int64_t end); \
  void contrast_queue_centres(const ContrastQueue& p, int64_t begin, int64_t end); \
  void contrast_queue(const ContrastQueue& p, int64_t begin, int64_t end); \
  void contrast_queue_finish(const ContrastQueue& p, int64_t begin, int64_t end); \
  }
SVITT_DECLARE(generic)
SVITT_DECLARE(avx2)
SVITT_DECLARE(avx512)
#undef SVITT_DECLARE

// The same on matrix tiles. Items of the packing are groups of 32 rows.
namespace avx512 {
void contrast_pack_amx(const TileOperands& to, int64_t begin, int64_t end);
void contrast_forward_amx(const ContrastForward& p, int64_t chunk, int64_t begin, int64_t end);
void contrast_backward_keys_amx(const ContrastBackward& p, int64_t chunk, int64_t begin,
                                int64_t end);
void contrast_backward_queries_amx(const ContrastBackward& p, int64_t chunk, int64_t begin,
                                   int64_t end);
void contrast_queue_amx(const ContrastQueue& p, int64_t begin, int64_t end);
}  // namespace avx512

}  // namespace svitt
