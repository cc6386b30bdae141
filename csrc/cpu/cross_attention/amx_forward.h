// Forward for bf16 on the AMX matrix tiles: the sweep of forward.h with both products on 16 x 16
// tiles.
//
// K's rows serve as the left operand where they lie and the few queries are packed; V is packed
// tile by tile, one permutation per 32 values. The weights come out of the softmax transposed and
// are turned 16 x 16 pairs at a time. Only they are rounded to bf16; logits, maximum, sum and
// accumulation stay in fp32.
#pragma once

#include "../common/pair_attention.h"

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "forward.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

struct CrossTileScratch {
  Arena arena;
  int dims;
  uint16_t *query, *keys, *values, *weights;  // weights (kQueryTile, kKeyTile)
  float *logits, *state;                      // logits (kKeyTile, kQueryTile)

  explicit CrossTileScratch(const CrossForward& p) : dims(p.head_dim) {
    query = arena.take<uint16_t>(kQueryTile * dims);
    arena.take_all(kKeyTile * dims, keys, values);
    weights = arena.take<uint16_t>(kQueryTile * kKeyTile);
    logits = arena.take<float>(kKeyTile * kQueryTile);
    state = arena.take<float>(State::size(p));
    // Rows past the last query go through the products, to nowhere.
    std::memset(weights, 0, sizeof(uint16_t) * kQueryTile * kKeyTile);
  }
};

/// Products of keys with `lanes` packed queries, rows of kQueryTile. The keys, padded to 32, serve
/// where they lie if they are side by side, else from a copy.
SVITT_INLINE void multiply_keys(const TileKeys& rows, int padded, const uint16_t* packed, int lanes,
                                int dims, uint16_t* copy, float* products) {
  const bool in_place = rows.n == padded && rows.together();
  if (!in_place) copy_pairs(rows, padded, dims, copy);
  multiply_dims(in_place ? rows(0) : copy, in_place ? rows.stride : dims, padded, packed, lanes,
                dims, products);
}

/// Weights of n keys for lanes [c, c + W), added to the sums. They are also wanted in fp32, `step`
/// apart, where `kept` is given. Beside the first lanes the rows `ahead` come to the cache.
SVITT_INLINE void exponentiate_pairs(const CrossTileScratch& s, const State& state, int n, int c,
                                     float scale, float* kept, int step,
                                     const TileKeys (&ahead)[2]) {
  const vf factor = splat(scale * kLog2e), low = load(state.most + c) * -kLog2e;
  alignas(64) uint16_t interleave[32];
  for (int i = 0; i < 32; ++i) interleave[i] = static_cast<uint16_t>(i / 2 + 16 * (i % 2));
  const __m512i order = _mm512_load_si512(interleave);
  vf sum{};
  for (int j = 0; j < n; j += kPairs) {
    vf pairs[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      vf e[2];
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const int at = j + 2 * i + k;
        if (c == 0 && at < ahead[0].n) {
          prefetch_row<false>(ahead[0](at), s.dims);
          prefetch_row<false>(ahead[1](at), s.dims);
        }
        e[k] = exp2_bf16(load(s.logits + at * kQueryTile + c) * factor + low);
        if (at >= n) e[k] = vf{};
        if (kept != nullptr && at < n) store(kept + at * step + c, e[k]);
        sum += e[k];
      }
      pairs[i] = reinterpret_cast<vf>(_mm512_permutexvar_epi16(order, round_pairs(e[0], e[1])));
    }
    transpose(pairs);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) std::memcpy(s.weights + (c + i) * kKeyTile + j, &pairs[i], 64);
  }
  store(state.sum + c, load(state.sum + c) + sum);
}

/// `attend` of forward.h.
inline void attend_amx(const CrossForward& p, const KeyRange& range, int64_t row, int rows,
                       CrossTileScratch& s, const State& state) {
  const int lanes = round_up(rows, W), dims = s.dims;
  const int64_t tile = kTile * kPairs;
  for (int r = 0; r < lanes; ++r) state.most[r] = -kInfinity, state.sum[r] = 0.0f;
  pack_key_tiles(some_rows<uint16_t>(p.query, range.b, range.h, row, rows),
                 round_up(rows, kTileRows), dims, s.query);
  const bool keep_row = p.saliency == Saliency::cls && row == 0;
  for (int64_t j = range.first; j < range.last; j += kKeyTile) {
    const int n = static_cast<int>(range.last - j < kKeyTile ? range.last - j : kKeyTile);
    const int padded = round_up(n, kPairs);
    const bool first = j == range.first;
    multiply_keys(TileKeys(p, p.key, range, j, n), padded, s.query, lanes, dims, s.keys, s.logits);
    const int64_t next = j + n, left = range.last - next;
    const int count = static_cast<int>(left < kKeyTile ? left : kKeyTile);
    const TileKeys ahead[2] = {{p, p.key, range, next, count}, {p, p.value, range, next, count}};
    raise_maxima(state, s.logits, kQueryTile, n, rows, p.scale, dims, first);
    float* kept = p.saliency == Saliency::mean ? state.weights + (j - range.first) * lanes
                  : keep_row                   ? s.logits
                                               : nullptr;
    for (int c = 0; c < lanes; c += W)
      exponentiate_pairs(s, state, n, c, p.scale, keep_row && c > 0 ? nullptr : kept,
                         keep_row ? kQueryTile : lanes, ahead);
    if (p.saliency != Saliency::none)
      std::memcpy(state.tops + (j - range.first) / kKeyTile * kQueryTile, state.most,
                  sizeof(float) * lanes);
    if (keep_row)
      for (int i = 0; i < n; ++i) state.weights[j - range.first + i] = s.logits[i * kQueryTile];
    pack_value_tiles(TileKeys(p, p.value, range, j, n), padded, dims, s.values);
    for (int r = 0; r < rows; r += kTileRows)
      for (int d = 0; d < dims; d += kPairs) {
        TileSum sum(state.out + r * dims + d, dims, !first);
        sum.add(padded / kPairs, s.weights + r * kKeyTile, kKeyTile, s.values + d / kTile * tile,
                dims / kTile * tile, tile);
        sum.store();
      }
  }
}

inline void cross_forward_amx(const CrossForward& p, int64_t begin, int64_t end) {
  const TileRegisters registers;
  CrossTileScratch s(p);
  cross_forward_items<bf16>(p, begin, end, s.state,
                            [&](const KeyRange& range, int64_t row, int rows, const State& state) {
                              attend_amx(p, range, row, rows, s, state);
                            });
}

SVITT_KERNELS_END
