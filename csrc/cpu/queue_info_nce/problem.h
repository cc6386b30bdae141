// What the dispatcher hands to the kernels of each instruction set.
#pragma once

#include <cstdint>

#include "../common/contrast.h"

namespace svitt {

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

struct QueueKernels : PackKernels {
  void (*centres)(const ContrastQueue& p, int64_t begin, int64_t end);
  void (*sweep)(const ContrastQueue& p, int64_t begin, int64_t end);
  void (*finish)(const ContrastQueue& p, int64_t begin, int64_t end);
};

}  // namespace svitt
