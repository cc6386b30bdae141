// Tiles of keys, as the forward and the backward of cross-attention read them.
#pragma once

#include "../common/attention_rows.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

constexpr int kQueryTile = 64;  // queries, held in the lanes of vectors
constexpr int kKeyTile = 64;    // keys, one row each

/// Where the keys of an item are: [first, last) of those that the sample attends.
struct KeyRange {
  int64_t b, h, first, last;

  KeyRange(const CrossAttention& p, int64_t item) {
    const int64_t head = item / p.parts, part = item % p.parts;
    b = head / p.heads, h = head % p.heads;
    const int64_t count = p.count_of(b);
    first = count * part / p.parts, last = count * (part + 1) / p.parts;
  }
};

struct Rows {
  const float* data;
  int64_t step;
};

/// Attended keys [j, j + n) as rows: in place where they are side by side in fp32, else copied.
/// `Again` is for rows that several products read: those far apart share sets of the cache, and
/// products over whole vectors need rows padded to them.
template <class T, bool Again>
SVITT_INLINE Rows tile_rows(const CrossAttention& p, const Matrix& m, const KeyRange& range,
                            int64_t j, int n, float* buffer, int width) {
  const int32_t* present = p.present_of(range.b);
  const int64_t first = present == nullptr ? j : present[j];
  const bool together = present == nullptr || present[j + n - 1] - first == n - 1;
  const T* from = base<T>(m, range.b, range.h);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (together && (!Again || (m.token == width && p.head_dim == width)))
      return {from + first * m.token, m.token};
  }
  if (together) {
    copy_rows(from + first * m.token, m.token, n, p.head_dim, buffer, width);
  } else {
    for (int i = 0; i < n; ++i)
      copy_rows(from + present[j + i] * m.token, 0, 1, p.head_dim, buffer + i * width, width);
  }
  return {buffer, width};
}

/// Attended keys [j, j + n) by number; null past them.
template <class Lane = uint16_t>
struct TileKeys {
  const Lane* data;
  int64_t stride, first;
  const int32_t* present;  // of the first key, or null
  int n;

  TileKeys(const CrossAttention& p, const Matrix& m, const KeyRange& range, int64_t j, int keys)
      : data(base<Lane>(m, range.b, range.h)), stride(m.token), first(j), n(keys) {
    const int32_t* numbers = p.present_of(range.b);
    present = numbers == nullptr ? nullptr : numbers + j;
  }
  bool together() const { return present == nullptr || present[n - 1] - present[0] == n - 1; }
  const Lane* operator()(int i) const {
    if (i >= n) return nullptr;
    return data + (present == nullptr ? first + i : present[i]) * stride;
  }
};

/// Queries [row, row + rows) of an operand, transposed: lanes past the last row are 0.
template <class T>
SVITT_INLINE void pack_queries(const CrossAttention& p, const Matrix& m, int64_t b, int64_t h,
                               int64_t row, int rows, float* columns) {
  pack_columns(base<T>(m, b, h) + row * m.token, m.token, rows, p.head_dim, columns,
               round_up(rows, W));
}

/// Visit the tiles of queries: `visit(number, row, rows)`.
template <class Visit>
SVITT_INLINE void each_query_tile(const CrossAttention& p, const Visit& visit) {
  for (int64_t row = 0; row < p.queries; row += kQueryTile) {
    const int64_t left = p.queries - row;
    visit(row / kQueryTile, row, static_cast<int>(left < kQueryTile ? left : kQueryTile));
  }
}

/// Products of a tile of n keys with packed queries, while the next tile of keys and values is on
/// its way to the cache: each group of rows brings as many lines as the sum has terms.
template <class T>
SVITT_INLINE void multiply_keys(const CrossAttention& p, const KeyRange& range, int64_t j, int n,
                                const Rows& rows, const float* columns, int lanes,
                                float* const* c) {
  const int32_t* present = p.present_of(range.b);
  const int64_t next = j + kKeyTile < range.last ? j + kKeyTile : j;
  const int64_t token = present == nullptr ? next : present[next];
  const char* key =
      reinterpret_cast<const char*>(base<T>(p.key, range.b, range.h) + token * p.key.token);
  const char* value =
      reinterpret_cast<const char*>(base<T>(p.value, range.b, range.h) + token * p.value.token);
  const int64_t row = p.key.token * static_cast<int64_t>(sizeof(T));
  const int lines = (p.head_dim * static_cast<int>(sizeof(T)) + 63) / 64;
  const int groups = (n + kRows - 1) / kRows;
  for (int g = 0; g < groups; ++g) {
    const int first = n * g / groups, size = n * (g + 1) / groups - first;
    const int done = g * (p.head_dim / lines);  // rows
    const Segment part{rows.data + first * rows.step,
                       columns,
                       kPanel,
                       static_cast<int64_t>(p.head_dim) * kPanel,
                       p.head_dim,
                       {key + done * row, value + done * row, row, lines}};
    if (done < kKeyTile) {
      multiply<true>(size, lanes, &part, 1, {rows.step, 1}, c + first, false);
    } else {
      multiply(size, lanes, &part, 1, {rows.step, 1}, c + first, false);
    }
  }
}

SVITT_KERNELS_END
