// What the dispatcher hands to the kernels of each instruction set: pointers, strides, sizes.
#pragma once

#include <cstdint>

#include "../common/attention.h"

namespace svitt {

enum class Saliency { none, cls, mean };

struct CrossAttention : AttentionInputs {
  int64_t queries, keys;
  // Of each sample the numbers of the keys that it attends, ascending, (batch, keys) and (batch,);
  // null where it attends all of them.
  const int32_t* present;
  const int64_t* counts;
  const bool* ignored;  // (batch, keys), or null
  int64_t parts;        // that the keys of a head are cut into, so that few heads make many items

  const int32_t* present_of(int64_t b) const {
    return present == nullptr ? nullptr : present + b * keys;
  }
  int64_t count_of(int64_t b) const { return present == nullptr ? keys : counts[b]; }
  int64_t most_of_a_part() const { return (keys + parts - 1) / parts; }
};

struct CrossForward : CrossAttention {
  Saliency saliency;
  void* out;        // (batch, queries, heads, head_dim) contiguous
  double* lse;      // (batch, heads, queries)
  float* rows;      // (batch, heads, keys), each head's share of the saliency; or null
  float* partials;  // `partial_size` floats for each part of each head; null if 1 part
};

struct CrossBackward : CrossAttention, AttentionGradients {
  // (batch, heads, parts, queries, head_dim) of the query's gradient; null if 1 part
  float* partials;
};

/// Items are parts of heads, then heads; independent of each other, so that any split over threads
/// gives the same bits. The second functions put the parts together.
struct CrossKernels {
  bool (*takes)(const CrossAttention& problem);
  int64_t (*partial_size)(const CrossForward& problem);
  void (*forward)(const CrossForward& problem, int64_t begin, int64_t end);
  void (*forward_join)(const CrossForward& problem, int64_t begin, int64_t end);
  void (*backward)(const CrossBackward& problem, int64_t begin, int64_t end);
  void (*backward_join)(const CrossBackward& problem, int64_t begin, int64_t end);
};

}  // namespace svitt
