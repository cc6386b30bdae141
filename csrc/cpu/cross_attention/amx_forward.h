// Forward for bf16 and fp32 on the AMX matrix tiles: the sweep of forward.h with both products on
// 16 x 16 tiles.
//
// In bf16 K's rows serve as the left operand where they lie and the few queries are packed; V is
// packed tile by tile, one permutation per 32 values. The weights come out of the softmax
// transposed and are turned 16 x 16 pairs at a time. Only they are rounded to bf16; logits,
// maximum, sum and accumulation stay in fp32.
//
// Tried in fp32, without gain: K and V split between the products of a tile, on the vector units,
// which those leave idle (from the L2 cache 1.1 times faster for 32 queries, but 1.1 slower for
// more); weights of 32 keys at a time; V of 64 at once (to 1.04 times slower).
#pragma once

#include "../common/pair_attention.h"

#include "../common/arena.h"
#include "../common/attention_rows.h"
#include "forward.h"
#include "problem.h"
#include "tiles.h"

SVITT_KERNELS_BEGIN

static_assert(kQueryTile == kStride && kKeyTile == kStride);

// Keys of a tile that are packed at once: in three parts, all would fill the L1 cache.
template <class T>
constexpr int kAtOnce = Operand<T>::kParts > 1 ? kTileRows : kKeyTile;

template <class T>
struct CrossTileScratch {
  static constexpr int kParts = Operand<T>::kParts;
  static constexpr int64_t kPart = kQueryTile * kKeyTile;  // of the weights
  Arena arena;
  int dims;
  uint16_t *query, *weights;  // weights (kQueryTile, kKeyTile)
  uint16_t* rows;             // keys, then values
  float *logits, *state;      // logits (kKeyTile, kQueryTile)

  explicit CrossTileScratch(const CrossForward& p) : dims(p.head_dim) {
    query = arena.take<uint16_t>(kParts * kQueryTile * dims);
    rows = arena.take<uint16_t>(kParts * kAtOnce<T> * dims);
    weights = arena.take<uint16_t>(kParts * kPart);
    logits = arena.take<float>(kKeyTile * kQueryTile);
    state = arena.take<float>(State::size(p));
    // Rows past the last query go through the products, to nowhere.
    std::memset(weights, 0, sizeof(uint16_t) * kParts * kPart);
  }
};

/// Products of keys with `lanes` packed queries, rows of kQueryTile. The keys, padded to 32, serve
/// where they lie if they are bf16 side by side, else from a copy of 32; `copied` where all are in
/// it already.
template <class T, class Keys>
SVITT_INLINE void multiply_keys(const Keys& rows, int padded, const uint16_t* packed, int lanes,
                                int dims, uint16_t* copy, float* products, bool copied = false) {
  if constexpr (Operand<T>::kParts == 1)
    if (rows.n == padded && rows.together())
      return multiply_dims(rows(0), rows.stride, padded, packed, lanes, dims, products);
  const int64_t part = static_cast<int64_t>(kTileRows) * dims;
  for (int r = 0; r < padded; r += kTileRows) {
    if (!copied) Operand<T>::copy([&](int i) { return rows(r + i); }, kTileRows, dims, copy, part);
    multiply_dims<T>(copy, dims, kTileRows, packed, lanes, dims, products + r * kStride, part);
  }
}

/// Weights of n keys for lanes [c, c + W), added to the sums. They are also wanted in fp32, `step`
/// apart, where `kept` is given. Beside the first lanes the rows `ahead` come to the cache.
SVITT_INLINE void exponentiate_pairs(const CrossTileScratch<bf16>& s, const State& state, int n,
                                     int c, float scale, float* kept, int step,
                                     const TileKeys<> (&ahead)[2]) {
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

/// The same in three parts; in fp32 they are always kept, in the place of the logits.
SVITT_INLINE void exponentiate_pairs(const CrossTileScratch<float>& s, const State& state, int n,
                                     int c, float scale, float* kept, int step,
                                     const TileKeys<float> (&ahead)[2]) {
  const vf most = load(state.most + c);
  const int padded = round_up(n, kPairs);
  vf sum{};
  for (int j = 0; j < padded; ++j) {
    if (c == 0 && j < ahead[0].n) {
      prefetch_row<false>(ahead[0](j), s.dims);
      prefetch_row<false>(ahead[1](j), s.dims);
    }
    float* x = s.logits + j * kQueryTile + c;
    const vf e = j < n ? exp_nonpositive(load(x) * scale - most) : vf{};
    store(x, e);
    if (kept != nullptr && j < n) store(kept + j * step + c, e);
    sum += e;
  }
  store(state.sum + c, load(state.sum + c) + sum);
  for (int j = 0; j < padded; j += kPairs)
    Operand<float>::pack_turned(s.logits + j * kQueryTile + c, kQueryTile,
                                s.weights + c * kKeyTile + j, kKeyTile, s.kPart);
}

/// `attend` of forward.h.
template <class T>
void attend_amx(const CrossForward& p, const KeyRange& range, int64_t row, int rows,
                CrossTileScratch<T>& s, const State& state) {
  using Lane = typename Operand<T>::Lane;
  using Keys = TileKeys<Lane>;
  const int lanes = round_up(rows, W), dims = s.dims;
  for (int r = 0; r < lanes; ++r) state.most[r] = -kInfinity, state.sum[r] = 0.0f;
  Operand<T>::pack_keys(some_rows<Lane>(p.query, range.b, range.h, row, rows),
                        round_up(rows, kTileRows), dims, s.query);
  const bool keep_row = p.saliency == Saliency::cls && row == 0;
  for (int64_t j = range.first; j < range.last; j += kKeyTile) {
    const int n = static_cast<int>(range.last - j < kKeyTile ? range.last - j : kKeyTile);
    const int padded = round_up(n, kPairs);
    const bool first = j == range.first;
    multiply_keys<T>(Keys(p, p.key, range, j, n), padded, s.query, lanes, dims, s.rows, s.logits);
    const int64_t next = j + n, left = range.last - next;
    const int count = static_cast<int>(left < kKeyTile ? left : kKeyTile);
    const Keys ahead[2] = {{p, p.key, range, next, count}, {p, p.value, range, next, count}};
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
    const Keys values(p, p.value, range, j, n);
    for (int k = 0; k < padded; k += kAtOnce<T>) {
      const int depth = padded - k < kAtOnce<T> ? padded - k : kAtOnce<T>;
      Operand<T>::pack_values([&](int i) { return values(k + i); }, depth, dims, s.rows);
      multiply_pairs<T>(s.weights + k, s.rows, rows, depth, dims, state.out, !first || k > 0,
                        s.kPart);
    }
  }
}

template <class T>
void cross_forward_tiles(const CrossForward& p, int64_t begin, int64_t end) {
  const TileRegisters registers;
  CrossTileScratch<T> s(p);
  cross_forward_items<T>(p, begin, end, s.state,
                         [&](const KeyRange& range, int64_t row, int rows, const State& state) {
                           attend_amx<T>(p, range, row, rows, s, state);
                         });
}

inline void cross_forward_amx(const CrossForward& p, int64_t begin, int64_t end) {
  if (p.dtype == Dtype::f32) return cross_forward_tiles<float>(p, begin, end);
  cross_forward_tiles<bf16>(p, begin, end);
}

SVITT_KERNELS_END
