// Forward: the keys of a head are staged once, then each row block sweeps its tiles, flash-style.
// Tried without gain: packing the half vectors of 56-key tiles side by side (an eighth less of
// Q K^T, 2 % of the time); prefetching V while K is staged; prefetching the tiles of the next
// block, in bursts or beside the products; prefetching the next head in fp32, which leaves no room
// for it in the L2 cache; prefetching B inside the products; keys by queries, as the backward has
// them (no staging, but slower where K and V fill the L2 cache). Streaming stores of the result
// gain 4 % here and cost more in the projection that reads it.
#pragma once

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "bias.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

constexpr int kLogitStride =
    kColumns + W;  // not a power of two: rows fall into different cache sets

/// What both forward kernels keep for the rows of a block.
struct RowScratch {
  Arena arena;
  float *most, *sum;
  Chunk* chunk;
  BiasColumns* bias;
  int64_t rows;

  explicit RowScratch(const Attention& p)
      : rows(p.block_size > p.num_global ? p.block_size : p.num_global) {
    arena.take_all(rows, most, sum);
    chunk = arena.take<Chunk>(1);
    bias = arena.take<BiasColumns>(1);
  }
};

/// Rows of global 0: logits while sweeping, probabilities once the row's log-sum-exp is known.
SVITT_INLINE float* saliency_row(const Forward& p, const RowBlock& block) {
  if (p.saliency == nullptr || !block.global) return nullptr;
  return p.saliency + (block.b * p.heads + block.h) * p.num_tokens();
}

SVITT_INLINE void keep_saliency(const Forward& p, const RowBlock& block, const Chunk& chunk,
                                const float* logits) {
  float* saliency = saliency_row(p, block);
  if (saliency == nullptr) return;
  for (int i = 0; i < chunk.columns; ++i)
    if (chunk.token[i] >= p.num_global) saliency[chunk.token[i] - p.num_global] = logits[i];
}

template <class T>
void write_results(const Forward& p, const RowBlock& block, int64_t length, const float* out,
                   int width, const RowScratch& s) {
  for (int row = block.row; row < block.end; ++row) {
    const int r = row - block.row;
    const bool some = r < block.rows && s.sum[r] != 0.0f;
    T* to = result_row<T>(p, p.out, p.tokens, block.b, block.h, row);
    p.lse[(block.b * p.heads + block.h) * p.tokens + row] =
        some ? static_cast<double>(s.most[r]) + __builtin_log(static_cast<double>(s.sum[r]))
             : -kInfinity;
    if (some) {
      write_row(to, out + r * width, p.head_dim, 1.0f / s.sum[r]);
    } else {
      std::memset(static_cast<void*>(to), 0, sizeof(T) * p.head_dim);
    }
  }
  float* saliency = saliency_row(p, block);
  if (saliency == nullptr) return;
  const int64_t existing = length > p.num_global ? length - p.num_global : 0;
  for (int64_t i = 0; i < existing; ++i)
    saliency[i] = exp_nonpositive(splat(saliency[i] - s.most[0]))[0] / s.sum[0];
  for (int64_t i = existing; i < p.num_tokens(); ++i) saliency[i] = 0.0f;
}

/// Online softmax of one row: from the chunk's maximum to the row's, and what was accumulated so
/// far brought there. Returns the factor of the old sum.
SVITT_INLINE float advance(float chunk_most, bool first, float* most, float* out, int width) {
  const float now = first || chunk_most > *most ? chunk_most : *most;
  float keep = 0.0f;
  if (!first) {
    keep = exp_nonpositive(splat(*most - now))[0];
    if (keep != 1.0f)
      for (int d = 0; d < width; d += W) store(out + d, load(out + d) * keep);
  }
  *most = now;
  return keep;
}

template <class T>
struct ForwardScratch : RowScratch {
  Tiling tiling;
  int width;  // head_dim rounded up to W
  float *query, *keys, *value_buffer, *logits, *out;
  int64_t key_tile;
  HeadRows values;

  explicit ForwardScratch(const Forward& p)
      : RowScratch(p), tiling(p, W), width(round_up(p.head_dim, W)) {
    key_tile = static_cast<int64_t>(round_up(tiling.width, kPanel)) * p.head_dim;
    keys = arena.take<float>(tiling.tiles() * key_tile);
    value_buffer = arena.take<float>(p.tokens * width);
    arena.take_all(rows * width, query, out);
    logits = arena.take<float>(kRows * kLogitStride);
  }
  void stage(const Forward& p, int64_t b, int64_t h) {
    tiling.length = static_cast<int>(p.length(b));
    stage_columns<T>(tiling, p.key, b, h, p.head_dim, keys);
    values.template stage<T>(p.value, b, h, tiling.length, p.head_dim, value_buffer, width);
  }
};

/// While the weights of row r are computed: where its result goes and what the next block starts
/// with.
template <class T>
SVITT_INLINE void prefetch_neighbours(const Forward& p, const RowBlock& block, int r) {
  const int64_t row = block.row + r;
  prefetch_row<true>(result_row<T>(p, p.out, p.tokens, block.b, block.h, row), p.head_dim);
  if (row + p.block_size < p.tokens)
    prefetch_row<false>(base<T>(p.query, block.b, block.h) + (row + p.block_size) * p.query.token,
                        p.head_dim);
}

/// And what the next head is staged from.
template <class T>
SVITT_INLINE void prefetch_head(const Forward& p, const RowBlock& block, int r) {
  if (block.h + 1 >= p.heads) return;
  const int64_t row = block.row + r;
  prefetch_row<false>(base<T>(p.key, block.b, block.h + 1) + row * p.key.token, p.head_dim);
  prefetch_row<false>(base<T>(p.value, block.b, block.h + 1) + row * p.value.token, p.head_dim);
}

template <class T>
void forward_block(const Forward& p, RowBlock& block, ForwardScratch<T>& s) {
  const float* table = p.table == nullptr ? nullptr : p.table + block.h * p.table_stride;
  Chunk& chunk = *s.chunk;
  copy_rows(base<T>(p.query, block.b, block.h) + block.row * p.query.token, p.query.token,
            block.rows, p.head_dim, s.query, s.width);
  for (int r = 0; r < block.rows; ++r) s.sum[r] = 0.0f;
  if (table != nullptr && block.rows > 0) s.bias->bind(p, block.b);

  float *logit_rows[kRows], *out_rows[kRows];
  for (int r = 0; r < kRows; ++r) logit_rows[r] = s.logits + r * kLogitStride;
  Segment weighted[kSegments];
  for (bool first = true; block.rows > 0 && block.gather(s.tiling, chunk); first = false) {
    if (table != nullptr) s.bias->describe(chunk);
    const int segments = column_segments(chunk, s.tiling, s.logits, s.values, weighted);
    const int groups = (block.rows + kRows - 1) / kRows;
    for (int g = 0; g < groups; ++g) {
      const int r0 = block.rows * g / groups, rows = block.rows * (g + 1) / groups - r0;
      for (int i = 0; i < chunk.entries; ++i) {
        const Entry& e = chunk.entry[i];
        const Segment dots{s.query + r0 * s.width, s.keys + e.tile * s.key_tile, kPanel,
                           static_cast<int64_t>(p.head_dim) * kPanel, p.head_dim};
        float* to[kRows];
        for (int r = 0; r < rows; ++r) to[r] = logit_rows[r] + e.column;
        multiply(rows, s.tiling.width, &dots, 1, {s.width, 1}, to, false);
      }
      // Two passes, so that the reductions of many rows overlap.
      float most[kRows];
      for (int r = 0; r < rows; ++r) {
        prefetch_neighbours<T>(p, block, r0 + r);
        most[r] = finish_logits(p, block, chunk, *s.bias, table, block.row + r0 + r, logit_rows[r]);
      }
      if (r0 == 0) keep_saliency(p, block, chunk, logit_rows[0]);
      for (int r = 0; r < rows; ++r) {
        out_rows[r] = s.out + (r0 + r) * s.width;
        const float keep = advance(most[r], first, s.most + r0 + r, out_rows[r], s.width);
        s.sum[r0 + r] =
            s.sum[r0 + r] * keep + exponentiate(logit_rows[r], chunk.columns, s.most[r0 + r]);
      }
      multiply(rows, p.head_dim, weighted, segments, {kLogitStride, 1}, out_rows, !first);
    }
  }
  write_results<T>(p, block, s.tiling.length, s.out, s.width, s);
}

/// The items [begin, end), by `stage` and `forward_block` of the scratch.
template <class Scratch>
void forward_items(const Forward& p, int64_t begin, int64_t end) {
  Scratch scratch(p);
  RowBlock block;
  int64_t staged = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / p.row_blocks(), b = head / p.heads, h = head % p.heads;
    if (head != staged) scratch.stage(p, b, h);
    staged = head;
    block.start(p, scratch.tiling.length, b, h, item % p.row_blocks());
    block.rewind(scratch.tiling);
    forward_block(p, block, scratch);
  }
}

inline void forward(const Forward& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { forward_items<ForwardScratch<decltype(x)>>(p, begin, end); });
}

SVITT_KERNELS_END
