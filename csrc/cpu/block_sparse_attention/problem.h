// What the dispatcher hands to the kernels of each instruction set: pointers, strides, sizes.
#pragma once

#include <cstdint>

#include "../common/attention.h"

namespace svitt {

struct BlockLists {  // (1 or batch, 1 or heads, blocks[, width]); a stride of 0 broadcasts
  const int32_t* counts;
  const int32_t* numbers;
  int64_t batch, head;  // in rows
  int64_t width;
};

// The bias table of one head, rearranged: the R0 rows with `kTablePad` floats on both sides, then
// the rows of the globals. The forward takes many keys for one query and has the R0 rows reversed,
// so that keys of consecutive codes are consecutive in memory; the backward takes many queries for
// one key.
constexpr int kTablePad = 16;

struct Attention : AttentionInputs {
  int64_t tokens;
  int block_size, num_global;
  int64_t blocks;
  BlockLists keys;
  const float* table;  // (heads, table_stride) rearranged, or null
  int64_t table_stride;
  int64_t table_rows;      // R0
  const int32_t* codes;    // (1 or batch, num_tokens)
  int64_t codes_stride;    // 0 broadcasts
  const int32_t* lengths;  // (batch,) or null

  int64_t num_tokens() const { return tokens - num_global; }
  int64_t centre() const { return (table_rows - 1) / 2 + kTablePad; }
  int64_t extra() const { return table_rows + 2 * kTablePad; }
  int64_t length(int64_t b) const {
    if (lengths == nullptr) return tokens;
    const int64_t n = lengths[b];
    return n < 0 ? 0 : n > tokens ? tokens : n;
  }
  // A row block: the globals as block -1, if there are any, then the blocks of tokens.
  int64_t row_blocks() const { return blocks + (num_global > 0 ? 1 : 0); }
};

struct Forward : Attention {
  void* out;        // (batch, tokens, heads, head_dim) contiguous
  double* lse;      // (batch, heads, tokens)
  float* saliency;  // (batch, heads, num_tokens), rows of global 0; or null
};

struct Backward : Attention, AttentionGradients {
  float* grad_table;  // (batch, heads, table_stride) rearranged, zeroed; or null
};

/// Items are independent of each other: any split over threads gives the same bits.
struct BlockSparseKernels {
  bool (*takes)(const Attention& problem);
  void (*forward)(const Forward& problem, int64_t begin, int64_t end);
  void (*backward)(const Backward& problem, int64_t begin, int64_t end);
};

}  // namespace svitt
