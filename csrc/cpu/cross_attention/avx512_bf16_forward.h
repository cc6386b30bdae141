// Forward for bf16 by VDPBF16PS: the sweep of forward.h with products of pairs.
//
// K's rows serve as A where they lie and the few queries are packed. Weights of two neighbouring
// keys make pairs as they leave the softmax, which the second product reads by broadcast: nothing
// is transposed. Only they are rounded to bf16; logits, maximum, sum and accumulation stay in fp32.
#pragma once

#include "../common/avx512_bf16_gemm.h"

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "forward.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

struct CrossPairScratch {
  Arena arena;
  int dims;
  uint16_t *query, *keys, *values, *weights;  // weights (kKeyTile / 2, kQueryTile) pairs
  float *logits, *state;                      // logits (kKeyTile, kQueryTile)

  explicit CrossPairScratch(const CrossForward& p) : dims(p.head_dim) {
    query = arena.take<uint16_t>(kQueryTile * dims);
    arena.take_all(kKeyTile * dims, keys, values);
    weights = arena.take<uint16_t>(kKeyTile * kQueryTile);
    logits = arena.take<float>(kKeyTile * kQueryTile);
    state = arena.take<float>(State::size(p));
  }
};

/// Products of keys with `lanes` packed queries, from where the keys lie if they are side by side,
/// else from a copy.
SVITT_INLINE void multiply_keys(const TileKeys<>& rows, const uint16_t* packed, int lanes, int dims,
                                uint16_t* copy, float* products) {
  const bool in_place = rows.together();
  if (!in_place) copy_pairs(rows, rows.n, dims, copy);
  multiply(over_dims(in_place ? rows(0) : copy, in_place ? rows.stride : dims, packed, dims),
           rows.n, lanes / W, store_sums(products, lanes, false));
}

/// Weights of n keys for lanes [c, c + W) as pairs, added to the sums. They are also wanted in fp32
/// where `kept` is given. Beside those of each key goes `fetch`.
template <class Fetch>
SVITT_INLINE void exponentiate_lanes(const CrossPairScratch& s, const State& state, int n, int c,
                                     int lanes, float scale, float* kept, const Fetch& fetch) {
  const __m512i order = pair_order();
  const vf factor = splat(scale * kLog2e), low = load(state.most + c) * -kLog2e;
  const auto weigh = [&](int j) __attribute__((always_inline)) {
    fetch(j);
    const vf e = exp2_bf16(load(s.logits + j * lanes + c) * factor + low);
    if (kept != nullptr) store(kept + j * lanes + c, e);
    return e;
  };
  vf even{}, odd{};
  for (int j = 0; j < n; j += 2) {
    const vf first = weigh(j), second = j + 1 < n ? weigh(j + 1) : vf{};
    even += first, odd += second;
    _mm512_storeu_si512(s.weights + j * lanes + 2 * c,
                        _mm512_permutexvar_epi16(order, round_pairs(first, second)));
  }
  store(state.sum + c, load(state.sum + c) + (even + odd));
}

/// `attend` of forward.h.
inline void attend_pairs(const CrossForward& p, const KeyRange& range, int64_t row, int rows,
                         CrossPairScratch& s, const State& state) {
  const int lanes = round_up(rows, W), dims = s.dims;
  for (int r = 0; r < lanes; ++r) state.most[r] = -kInfinity, state.sum[r] = 0.0f;
  pack_key_tiles(some_rows<uint16_t>(p.query, range.b, range.h, row, rows), lanes, dims, s.query);
  const bool keep_row = p.saliency == Saliency::cls && row == 0;
  for (int64_t j = range.first; j < range.last; j += kKeyTile) {
    const int n = static_cast<int>(range.last - j < kKeyTile ? range.last - j : kKeyTile);
    const bool first = j == range.first;
    multiply_keys(TileKeys(p, p.key, range, j, n), s.query, lanes, dims, s.keys, s.logits);
    raise_maxima(state, s.logits, lanes, n, rows, p.scale, dims, first);
    const int64_t next = j + n, left = range.last - next;
    const int count = static_cast<int>(left < kKeyTile ? left : kKeyTile);
    const TileKeys<> ahead[2] = {{p, p.key, range, next, count}, {p, p.value, range, next, count}};
    float* kept = p.saliency == Saliency::mean ? state.weights + (j - range.first) * lanes
                  : keep_row                   ? s.logits
                                               : nullptr;
    exponentiate_lanes(s, state, n, 0, lanes, p.scale, kept,
                       [&](int i) __attribute__((always_inline)) {
                         if (i >= count) return;
                         prefetch_row<false>(ahead[0](i), dims);
                         prefetch_row<false>(ahead[1](i), dims);
                       });
    for (int c = W; c < lanes; c += W)
      exponentiate_lanes(s, state, n, c, lanes, p.scale, kept, [](int) {});
    if (p.saliency != Saliency::none)
      std::memcpy(state.tops + (j - range.first) / kKeyTile * kQueryTile, state.most,
                  sizeof(float) * lanes);
    if (keep_row)
      for (int i = 0; i < n; ++i) state.weights[j - range.first + i] = s.logits[i * lanes];
    pack_row_pairs(TileKeys(p, p.value, range, j, n), n, dims, s.values);
    multiply(over_rows(s.weights, 2, 2 * lanes, s.values, n, dims), rows, dims / W,
             store_sums(state.out, dims, !first));
  }
}

inline void cross_forward_pairs(const CrossForward& p, int64_t begin, int64_t end) {
  CrossPairScratch s(p);
  cross_forward_items<bf16>(p, begin, end, s.state,
                            [&](const KeyRange& range, int64_t row, int rows, const State& state) {
                              attend_pairs(p, range, row, rows, s, state);
                            });
}

SVITT_KERNELS_END
