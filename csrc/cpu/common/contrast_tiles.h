// Tiles of similarities, a few query rows by kKeyTile keys, as they come out of the product.
#pragma once

#include "contrast.h"
#include "gemm.h"
#include "simd.h"

SVITT_KERNELS_BEGIN

constexpr int kDotRows = 4 * kRows;
constexpr int kPiece =
    64;  // long sums are sums of short ones, where errors of a kind do not add up
constexpr int kDotStride = kKeyTile + W;

/// Logits of a tile share one offset, and so one exponential serves its rows and its columns, where
/// they differ by no more than this: the smallest then is far from vanishing.
constexpr float kShared = 60.0f;

/// Within, numbers too small for a normal float are 0: at low temperatures there are many, and a
/// processor takes a hundred times as long for each.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

template <class T>
const T* row_of(const void* data, int64_t step, int64_t row) {
  return static_cast<const T*>(data) + row * step;
}

/// Rows cut into panels of kPanel dims: panel, row, dim. Dims beyond the last are 0.
template <class T>
void pack_panels(const void* data, int64_t step, int dim, int64_t begin, int64_t end, int64_t rows,
                 float* panels) {
  for (int d = 0; d < dim; d += kPanel)
    for (int64_t r = begin; r < end; ++r) {
      float* to = panels + (d / kPanel * rows + r) * kPanel;
      const T* from = row_of<T>(data, step, r) + d;
      store(to, load_some(from, dim - d));
      store(to + W, dim - d > W ? load_some(from + W, dim - d - W) : vf{});
    }
}

template <class T>
void pack_queries(const Contrast& p, float* panels, int64_t begin, int64_t end) {
  if (static_cast<const void*>(p.rows) != p.query)
    for (int64_t r = begin; r < end; ++r) {
      const T* from = row_of<T>(p.query, p.query_step, r);
      float* to = p.rows + r * p.row_step;
      for (int d = 0; d < p.dim; ++d) to[d] = to_float(from[d]);
    }
  if (panels != nullptr)
    pack_panels<T>(p.query, p.query_step, p.dim, begin, end, p.queries, panels);
}

template <class T>
void pack_keys(const Contrast& p, float* panels, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = t * kKeyTile, left = p.keys - first;
    const int count = static_cast<int>(left < kKeyTile ? left : kKeyTile);
    pack_columns(row_of<T>(p.key, p.key_step, first), p.key_step, count, p.dim,
                 p.columns + first * p.dim, round_up(count, kPanel));
    if (panels != nullptr)
      pack_panels<T>(p.key, p.key_step, p.dim, first, first + count, p.padded_keys(), panels);
  }
}

inline void contrast_pack_queries(const Contrast& p, float* panels, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { pack_queries<decltype(x)>(p, panels, begin, end); });
}

inline void contrast_pack_keys(const Contrast& p, float* panels, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto x) { pack_keys<decltype(x)>(p, panels, begin, end); });
}

constexpr PackKernels kPack = {nullptr, contrast_pack_queries, contrast_pack_keys, nullptr};

/// One panel of C = or += A B, summed in pieces.
SVITT_INLINE void multiply_pieces(int rows, const float* a, Strides strides, const float* b,
                                  int depth, float* const* c, bool add, int most = kPiece) {
  for (int k = 0; k < depth; k += most) {
    const Segment piece{a + k * strides.step, b + static_cast<int64_t>(k) * kPanel, kPanel, 0,
                        depth - k < most ? depth - k : most};
    multiply(rows, kPanel, &piece, 1, strides, c, add || k > 0);
  }
}

/// Similarities of some rows with one tile of keys.
struct DotTile {
  int64_t row, tile, first_key;
  int rows, keys;  // existing ones
  float* dots;     // (rows, kDotStride)
  float most, least;

  void compute(const Contrast& p) {
    float* to[kDotRows];
    const int quarter = round_up((p.dim + 3) / 4, 16), piece = quarter < kPiece ? quarter : kPiece;
    for (int panel = 0; panel * kPanel < keys; ++panel) {
      for (int r = 0; r < rows; ++r) to[r] = dots + r * kDotStride + panel * kPanel;
      const float* b = p.columns + first_key * p.dim + static_cast<int64_t>(panel) * p.dim * kPanel;
      multiply_pieces(rows, p.rows + row * p.row_step, {p.row_step, 1}, b, p.dim, to, false, piece);
    }
  }

  /// Calls visit(row, column, dot) for every positive pair, in order.
  template <class F>
  SVITT_INLINE void for_positives(const Contrast& p, F visit) const {
    if (p.key_ids == nullptr) {
      for (int r = 0; r < rows; ++r) {
        const int64_t c = p.first_row + row + r - first_key;
        if (c >= 0 && c < keys) visit(r, static_cast<int>(c), dots[r * kDotStride + c]);
      }
      return;
    }
    for (int r = 0; r < rows; ++r) {
      const int32_t id = p.query_ids[row + r];
      for (int c = 0; c < keys; c += W) {
        const vi ids = load_ids(p, c);
        if (!any_lane(ids == id)) continue;
        for (int i = 0; i < W && c + i < keys; ++i)
          if (ids[i] == id) visit(r, c + i, dots[r * kDotStride + c + i]);
      }
    }
  }

  /// The ids of W keys; -1, which nobody has, beyond the last.
  vi load_ids(const Contrast& p, int c) const {
    if (keys - c >= W) return load_as<vi>(p.key_ids + first_key + c);
    vi ids = vi{} - 1;
    for (int i = 0; c + i < keys; ++i) ids[i] = p.key_ids[first_key + c + i];
    return ids;
  }

  /// Which of W keys are positives of a row.
  vi positives(const Contrast& p, int r, int c) const {
    if (p.key_ids != nullptr) return load_ids(p, c) == p.query_ids[row + r];
    const int64_t own = p.first_row + row + r - first_key - c;
    return lane_numbers() == (own >= 0 && own < keys - c ? static_cast<int32_t>(own) : -1);
  }

  /// Which similarities are no logits; see `set_temperature`.
  static vi beyond(vf x, float limit) {
    return ~(reinterpret_cast<vf>(reinterpret_cast<vi>(x) & 0x7fffffff) < splat(limit));
  }

  /// Whether a row has such a similarity.
  bool unusable(int r, float limit) const {
    vi bad{};
    for (int c = 0; c < keys; c += W) bad |= beyond(load(dots + r * kDotStride + c), limit);
    return any_lane(bad);
  }

  /// Makes positives and padding -inf.
  void keep_negatives(const Contrast& p) {
    for_positives(p, [&](int r, int c, float) { dots[r * kDotStride + c] = -kInfinity; });
    for (int r = 0; r < rows; ++r)
      for (int c = keys; c % W != 0; ++c) dots[r * kDotStride + c] = -kInfinity;
  }

  /// The range of all that is not -inf. Four rows at a time: a maximum waits for the one before.
  void find_range() {
    constexpr int kTogether = 4;
    vf high[kTogether], low[kTogether];  // `low` negated
    for (int i = 0; i < kTogether; ++i) high[i] = low[i] = splat(-kInfinity);
    for (int r = 0; r < rows; r += kTogether)
      for (int c = 0; c < keys; c += W)
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          const int row = r + i < rows ? r + i : rows - 1;
          const vf v = load(dots + row * kDotStride + c);
          high[i] = vmax(high[i], v);
          low[i] = vmax(low[i], v == -kInfinity ? v : -v);
        }
    most = hmax(vmax(vmax(high[0], high[1]), vmax(high[2], high[3])));
    least = -hmax(vmax(vmax(low[0], low[1]), vmax(low[2], low[3])));
  }
  bool shared(float scale) const { return (most - least) * scale <= kShared; }
};

/// Some queries by a tile of keys, not computed yet.
SVITT_INLINE DotTile place_tile(const Contrast& p, int64_t row, int64_t rows, int64_t tile,
                                float* dots) {
  DotTile t{};
  const int64_t left = p.keys - tile * kKeyTile;
  t.row = row, t.tile = tile, t.first_key = tile * kKeyTile, t.dots = dots;
  t.rows = static_cast<int>(rows), t.keys = static_cast<int>(left < kKeyTile ? left : kKeyTile);
  return t;
}

SVITT_INLINE int64_t chunk_end(const Contrast& p, int64_t chunk) {
  const int64_t end = (chunk + 1) * kQueryChunk;
  return end < p.queries ? end : p.queries;
}

/// The same, of a chunk: at most so many queries.
SVITT_INLINE DotTile dot_tile(const Contrast& p, int64_t chunk, int64_t row, int64_t tile,
                              float* dots, int most_rows = kDotRows) {
  const int64_t left = chunk_end(p, chunk) - row;
  return place_tile(p, row, left < most_rows ? left : most_rows, tile, dots);
}

SVITT_KERNELS_END
