// The 3-D relative position bias, and logits from dot products.
// Tried without gain: a look-up without branches where no vector has more than two runs.
#pragma once

#include "../common/simd.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

/// The codes of W tokens, one per lane, as runs of consecutive numbers.
///
/// Rows of the token grid give long runs, and a run against one other token is one unaligned load
/// from the table. Vectors of more than three runs (pruned tokens) go lane by lane.
struct LaneCodes {
  static constexpr int kRuns = 3;
  int count;              // 0: lane by lane
  int32_t offset[kRuns];  // the code that lane 0 would have in this run
  int32_t first[kRuns];   // the run's first lane
  int32_t code[W];

  /// Lane i holds token[i]; negative numbers and globals are lanes without a code.
  void describe(const int32_t* token, int num_global, const int32_t* codes) {
    // Lanes without a code continue their neighbour's run; the table's padding makes that safe.
    const int32_t some = codes == nullptr ? 0 : codes[0];
    int known = -1;
    for (int lane = 0; lane < W; ++lane) {
      if (token[lane] >= num_global) {
        code[lane] = codes[token[lane] - num_global];
        if (known < 0) known = lane;
      } else if (known >= 0) {
        code[lane] = code[lane - 1] + 1;
      }
    }
    for (int lane = 0; lane < (known < 0 ? W : known); ++lane)
      code[lane] = known < 0 ? some + lane : code[known] - (known - lane);
    count = 0;
    for (int lane = 0; lane < W; ++lane) {
      if (lane > 0 && code[lane] == code[lane - 1] + 1) continue;
      if (count == kRuns) {
        count = 0;
        return;
      }
      offset[count] = code[lane] - lane;
      first[count++] = lane;
    }
  }

  /// Entries table[code] of the lanes.
  SVITT_INLINE vf look_up(const float* table) const {
    vf found;
    if (count > 0) {
      found = load(table + offset[0]);
      for (int i = 1; i < count; ++i)
        found = lane_numbers() >= first[i] ? load(table + offset[i]) : found;
    } else {
      for (int lane = 0; lane < W; ++lane) found[lane] = table[code[lane]];
    }
    return found;
  }

  /// The transpose of `look_up`; lanes without a code must be 0.
  SVITT_INLINE void add(float* table, vf grad) const {
    if (count > 0) {
      for (int i = 0; i < count; ++i) {
        const int32_t end = i + 1 < count ? first[i + 1] : W;
        const vi lanes = lane_numbers(), inside = (lanes >= first[i]) & (lanes < end);
        float* to = table + offset[i];
        store(to, load(to) + (inside ? grad : vf{}));
      }
    } else {
      for (int lane = 0; lane < W; ++lane) table[code[lane]] += grad[lane];
    }
  }
};

/// The bias of a chunk's columns, described once and applied to every row.
struct BiasColumns {
  LaneCodes lanes[kColumns / W];
  const int32_t* token;
  const int32_t* codes;
  int first_global, globals;  // columns of globals are consecutive
  int num_global;
  int64_t extra;  // where the rows of the globals start in a rearranged table
  int64_t centre;

  void bind(const Attention& p, int64_t b) {
    codes = p.codes + b * p.codes_stride;
    centre = p.centre();
    extra = p.extra();
    num_global = p.num_global;
  }

  void describe(const Chunk& chunk) {
    token = chunk.token;
    first_global = globals = 0;
    for (int i = 0; i < chunk.columns; ++i)
      if (token[i] >= 0 && token[i] < num_global && globals++ == 0) first_global = i;
    for (int i = 0; i < chunk.columns; i += W) lanes[i / W].describe(token + i, num_global, codes);
  }

  /// Bias of a token row against vector j; `table` is past the row's own code, see `row_table`.
  SVITT_INLINE vf token_row(const float* table, const float* row_table, int j) const {
    vf bias = lanes[j].look_up(row_table);
    if (has_globals(j))
      for_globals(j, [&](int lane, int g) { bias[lane] = table[extra + num_global + g]; });
    return bias;
  }
  const float* row_table(const float* table, int row) const {
    return table + centre - codes[row - num_global];
  }

  /// Bias of global `a` against vector j.
  SVITT_INLINE vf global_row(const float* table, int a, int j) const {
    vf bias = splat(table[extra + a]);
    const float* among = table + extra + 2 * num_global + static_cast<int64_t>(a) * num_global;
    if (has_globals(j)) for_globals(j, [&](int lane, int g) { bias[lane] = among[g]; });
    return bias;
  }

 private:
  SVITT_INLINE bool has_globals(int j) const {
    return globals > 0 && first_global < (j + 1) * W && first_global + globals > j * W;
  }
  template <class F>
  SVITT_INLINE void for_globals(int j, F visit) const {
    for (int lane = 0; lane < W; ++lane) {
      const int column = j * W + lane;
      if (column >= first_global && column < first_global + globals) visit(lane, token[column]);
    }
  }
};

/// Turn one row's dot products into logits in place; returns their maximum.
SVITT_INLINE float finish_logits(const Attention& p, const RowBlock& block, const Chunk& chunk,
                                 const BiasColumns& bias, const float* table, int row, float* s) {
  const vf scale = splat(p.scale);
  vf most = splat(-kInfinity);
  const bool token_bias = table != nullptr && !block.global;
  const float* row_table = token_bias ? bias.row_table(table, row) : nullptr;
  for (int c = 0; c < chunk.columns; c += W) {
    vf x = load(s + c) * scale + load(chunk.mask + c);
    if (token_bias)
      x += bias.token_row(table, row_table, c / W);
    else if (table != nullptr)
      x += bias.global_row(table, row, c / W);
    store(s + c, x);
    most = vmax(most, x);
  }
  return hmax(most);
}

/// exp(x - most) in place; returns the sum.
SVITT_INLINE float exponentiate(float* s, int columns, float most) {
  vf sum{};
  const vf m = splat(most);
  for (int c = 0; c < columns; c += W) {
    const vf e = exp_nonpositive(load(s + c) - m);
    store(s + c, e);
    sum += e;
  }
  return hsum(sum);
}

SVITT_KERNELS_END
