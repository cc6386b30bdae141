// Forward: one sweep over the keys for each tile of queries, flash-style.
//
// Logits are held transposed, keys by queries: K is then the operand that a product reads by
// broadcast, V the one whose rows are already right, and both, by far the largest arrays here, are
// read where they lie. Queries are the lanes of a vector, so the softmax needs no reduction over
// lanes. Where the keys of a head are cut into parts, each leaves a State in memory, and a second
// pass over the heads puts them together; else the State is scratch.
//
// Tried, without gain: copying the tiles of K and V first, so that the caches see them in order;
// prefetching the next tiles in bursts between the products, and not beside them.
#pragma once

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

/// Output, maximum and sum of a query tile over some keys, and what the saliency needs: weights
/// that are relative to the maxima at the time, and those maxima for each tile of keys.
struct State {
  float *out, *most, *sum, *tops, *weights;

  static int64_t size(const CrossForward& p) {
    const int64_t keys = p.most_of_a_part();
    const int64_t each = p.saliency == Saliency::mean ? kQueryTile : 1;
    return kQueryTile * (round_up(p.head_dim, W) + 2 + (keys + kKeyTile - 1) / kKeyTile) +
           (p.saliency == Saliency::none ? 0 : keys * each);
  }
  State(const CrossForward& p, float* memory) {
    out = memory;
    most = out + kQueryTile * round_up(p.head_dim, W);
    sum = most + kQueryTile;
    tops = sum + kQueryTile;
    weights = tops + (p.most_of_a_part() + kKeyTile - 1) / kKeyTile * kQueryTile;
  }
};

inline int64_t partial_size(const CrossForward& p) {
  return (p.queries + kQueryTile - 1) / kQueryTile * State::size(p);
}

struct CrossScratch {
  Arena arena;
  int width;  // head_dim rounded up to W
  float *query, *keys, *values, *weights, *state;

  explicit CrossScratch(const CrossForward& p) : width(round_up(p.head_dim, W)) {
    query = arena.take<float>(static_cast<int64_t>(kQueryTile) * p.head_dim);
    arena.take_all(kKeyTile * width, keys, values);
    weights = arena.take<float>(kKeyTile * kQueryTile);
    state = arena.take<float>(State::size(p));
  }
};

/// Raise the maxima to those of n more keys, whose logits are `step` apart, and bring sums and
/// outputs there.
SVITT_INLINE void raise_maxima(const State& s, const float* logits, int step, int n, int rows,
                               float scale, int width, bool first) {
  const int lanes = round_up(rows, W);
  alignas(64) float keep[kQueryTile];
  for (int c = 0; c < lanes; c += W) {
    vf most = load(logits + c) * scale;
    for (int j = 1; j < n; ++j) most = vmax(load(logits + j * step + c) * scale, most);
    if (first) {
      store(s.most + c, most);
      store(s.sum + c, vf{});
      continue;
    }
    const vf before = load(s.most + c);
    most = vmax(before, most);
    const vi same = most == before;
    // exp is not exactly 1 at 0.
    const vf factor = same ? splat(1.0f) : exp_nonpositive(before - most);
    store(keep + c, factor);
    store(s.sum + c, load(s.sum + c) * factor);
    store(s.most + c, most);
  }
  for (int r = 0; r < rows && !first; ++r)
    if (keep[r] != 1.0f)
      for (int d = 0; d < width; d += W)
        store(s.out + r * width + d, load(s.out + r * width + d) * keep[r]);
}

/// Logits of n keys to weights exp(scale * logit - maximum), added to the sums.
SVITT_INLINE void exponentiate_keys(const State& s, float* logits, int n, int lanes, float scale) {
  for (int c = 0; c < lanes; c += W) {
    const vf most = load(s.most + c);
    vf sum{};
    for (int j = 0; j < n; ++j) {
      float* x = logits + j * lanes + c;
      const vf e = exp_nonpositive(load(x) * scale - most);
      store(x, e);
      sum += e;
    }
    store(s.sum + c, load(s.sum + c) + sum);
  }
}

/// Queries [row, row + rows) over the keys of an item.
template <class T>
void attend(const CrossForward& p, const KeyRange& range, int64_t row, int rows, CrossScratch& s,
            const State& state) {
  const int lanes = round_up(rows, W), dims = p.head_dim;
  for (int r = 0; r < lanes; ++r) state.most[r] = -kInfinity, state.sum[r] = 0.0f;
  pack_queries<T>(p, p.query, range.b, range.h, row, rows, s.query);
  float *logit_rows[kKeyTile], *out_rows[kQueryTile];
  for (int r = 0; r < rows; ++r) out_rows[r] = state.out + r * s.width;
  const bool keep_row = p.saliency == Saliency::cls && row == 0;
  float* weights = s.weights;
  for (int64_t j = range.first; j < range.last; j += kKeyTile) {
    const int n = static_cast<int>(range.last - j < kKeyTile ? range.last - j : kKeyTile);
    const bool first = j == range.first;
    if (p.saliency == Saliency::mean) weights = state.weights + (j - range.first) * lanes;
    for (int i = 0; i < n; ++i) logit_rows[i] = weights + i * lanes;
    const Rows keys = tile_rows<T, false>(p, p.key, range, j, n, s.keys, s.width);
    multiply_keys<T>(p, range, j, n, keys, s.query, lanes, logit_rows);
    raise_maxima(state, weights, lanes, n, rows, p.scale, s.width, first);
    exponentiate_keys(state, weights, n, lanes, p.scale);
    if (p.saliency != Saliency::none)
      std::memcpy(state.tops + (j - range.first) / kKeyTile * kQueryTile, state.most,
                  sizeof(float) * lanes);
    if (keep_row)
      for (int i = 0; i < n; ++i) state.weights[j - range.first + i] = weights[i * lanes];
    const Rows values = tile_rows<T, true>(p, p.value, range, j, n, s.values, s.width);
    const Segment weighted{weights, values.data, values.step, kPanel, n};
    multiply(rows, dims, &weighted, 1, {1, lanes}, out_rows, !first);
  }
}

/// Add to the head's row of the saliency what the keys of one part received.
SVITT_INLINE void add_saliency(const CrossForward& p, const KeyRange& range, const State& state,
                               const float* most, const float* total, int rows) {
  const int lanes = round_up(rows, W);
  const int32_t* present = p.present_of(range.b);
  float* to = p.rows + (range.b * p.heads + range.h) * p.keys;
  alignas(64) float factor[kQueryTile];
  for (int64_t j = range.first; j < range.last; ++j) {
    const int64_t at = j - range.first;
    if (at % kKeyTile == 0) {
      const float* tops = state.tops + at / kKeyTile * kQueryTile;
      for (int c = 0; c < lanes; c += W)
        store(factor + c, exp_nonpositive(load(tops + c) - load(most + c)) / load(total + c));
      for (int r = rows; r < lanes; ++r) factor[r] = 0.0f;
    }
    float received = 0.0f;
    if (p.saliency == Saliency::cls) {
      received = state.weights[at] * factor[0];
    } else {
      vf sum{};
      for (int c = 0; c < lanes; c += W)
        sum += load(state.weights + at * lanes + c) * load(factor + c);
      received = hsum(sum);
    }
    to[present == nullptr ? j : present[j]] += received;
  }
}

/// Results of queries [row, row + rows) of a head from the States of all its parts, in order.
template <class T>
void finish(const CrossForward& p, int64_t b, int64_t h, int64_t row, int rows, float* states,
            int width) {
  const int64_t size = State::size(p), head = b * p.heads + h;
  const int lanes = round_up(rows, W);
  alignas(64) float most[kQueryTile], total[kQueryTile];
  for (int c = 0; c < lanes; c += W) {
    vf top = splat(-kInfinity), sum{};
    for (int64_t i = 0; i < p.parts; ++i)
      top = vmax(top, load(State(p, states + i * size).most + c));
    for (int64_t i = 0; i < p.parts; ++i) {
      const State state(p, states + i * size);
      const vf here = load(state.most + c);
      sum += load(state.sum + c) * (here == top ? splat(1.0f) : exp_nonpositive(here - top));
    }
    store(most + c, top);
    store(total + c, sum);
  }
  for (int r = 0; r < rows; ++r) {
    T* to = result_row<T>(p, p.out, p.queries, b, h, row + r);
    const bool some = total[r] != 0.0f;
    p.lse[head * p.queries + row + r] =
        some ? static_cast<double>(most[r]) + __builtin_log(static_cast<double>(total[r]))
             : -kInfinity;
    if (!some) {
      std::memset(static_cast<void*>(to), 0, sizeof(T) * p.head_dim);
      continue;
    }
    float* sum = State(p, states).out + r * width;
    for (int64_t i = 0; i < p.parts && p.parts > 1; ++i) {
      const State state(p, states + i * size);
      const float* out = state.out + r * width;
      const float factor =
          state.most[r] == most[r] ? 1.0f : exp_nonpositive(splat(state.most[r] - most[r]))[0];
      for (int d = 0; d < width; d += W) {
        // A part without a key has left no output.
        const vf scaled = state.sum[r] == 0.0f ? vf{} : load(out + d) * factor;
        store(sum + d, i == 0 ? scaled : load(sum + d) + scaled);
      }
    }
    write_row(to, sum, p.head_dim, 1.0f / total[r]);
  }
  const bool salient = p.saliency == Saliency::mean || (p.saliency == Saliency::cls && row == 0);
  if (!salient || p.count_of(b) == 0) return;
  for (int64_t i = 0; i < p.parts; ++i)
    add_saliency(p, KeyRange(p, head * p.parts + i), State(p, states + i * size), most, total,
                 rows);
}

SVITT_INLINE void clear_saliency(const CrossForward& p, int64_t head) {
  if (p.rows != nullptr) std::memset(p.rows + head * p.keys, 0, sizeof(float) * p.keys);
}

/// States of a query tile of a head, one for each part.
SVITT_INLINE float* states_of(const CrossForward& p, int64_t head, int64_t tile) {
  return p.partials + head * p.parts * partial_size(p) + tile * p.parts * State::size(p);
}

/// Every query tile of each item, by `attend(range, row, rows, state)`; `state` is scratch.
template <class T, class Attend>
void cross_forward_items(const CrossForward& p, int64_t begin, int64_t end, float* state,
                         const Attend& attend) {
  for (int64_t item = begin; item < end; ++item) {
    const KeyRange range(p, item);
    const int64_t head = item / p.parts, part = item % p.parts;
    if (p.parts == 1) clear_saliency(p, head);
    each_query_tile(p, [&](int64_t tile, int64_t row, int rows) {
      float* memory = p.parts == 1 ? state : states_of(p, head, tile) + part * State::size(p);
      attend(range, row, rows, State(p, memory));
      if (p.parts == 1) finish<T>(p, range.b, range.h, row, rows, memory, round_up(p.head_dim, W));
    });
  }
}

template <class T>
void cross_forward_of(const CrossForward& p, int64_t begin, int64_t end) {
  CrossScratch s(p);
  cross_forward_items<T>(p, begin, end, s.state,
                         [&](const KeyRange& range, int64_t row, int rows, const State& state) {
                           attend<T>(p, range, row, rows, s, state);
                         });
}

template <class T>
void cross_forward_heads(const CrossForward& p, int64_t begin, int64_t end) {
  for (int64_t head = begin; head < end; ++head) {
    clear_saliency(p, head);
    each_query_tile(p, [&](int64_t tile, int64_t row, int rows) {
      finish<T>(p, head / p.heads, head % p.heads, row, rows, states_of(p, head, tile),
                round_up(p.head_dim, W));
    });
  }
}

inline void cross_forward(const CrossForward& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { cross_forward_of<decltype(x)>(p, begin, end); });
}

inline void cross_forward_join(const CrossForward& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { cross_forward_heads<decltype(x)>(p, begin, end); });
}

SVITT_KERNELS_END
