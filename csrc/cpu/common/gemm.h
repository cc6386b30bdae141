// C (rows x columns) = or += A B with B packed, accumulators in registers.
//
// B is taken in panels of 2 W columns: panel p, row k starts at b + p * panel + k * step, so that
// both rows in place and packed transposes serve. A is read by broadcast with any strides, so that
// a transposed A costs nothing. Rows of C are given by pointers.
#pragma once

#include "simd.h"

SVITT_KERNELS_BEGIN

#if SVITT_LANES == 16
constexpr int kRows = 14;  // 28 accumulators, 2 of B, 1 broadcast: 31 of 32 registers
#else
constexpr int kRows = 6;  // 12 accumulators, 2 of B, 1 broadcast: 15 of 16 registers
#endif
constexpr int kPanel = 2 * W;

/// Rows of two arrays to bring to the cache beside a product, one line of each at each step of the
/// sum: in a burst they would wait for each other.
struct Ahead {
  const char *first, *second;
  int64_t row;  // bytes from one row to the next
  int lines;    // of a row
};

/// One stretch of the summed dimension: A(r, k) = a[r * row + k * step].
struct Segment {
  const float* a;
  const float* b;
  int64_t step, panel;  // of B
  int depth;
  Ahead ahead = {};
};
struct Strides {
  int64_t row, step;
};

template <bool Fetch, int R, int C>
void multiply_tile(const Segment* segments, int count, int64_t row, int panel, Strides a,
                   float* const* c, int column, bool add) {
  vf acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < C; ++j) acc[r][j] = vf{};
  for (int i = 0; i < count; ++i) {
    const float* x = segments[i].a + row * a.row;
    const float* b = segments[i].b + panel * segments[i].panel;
    const int64_t step = segments[i].step;
    Ahead ahead = segments[i].ahead;
    int line = 0;
    for (int k = 0; k < segments[i].depth; ++k) {
      if constexpr (Fetch) {
        __builtin_prefetch(ahead.first + 64 * line, 0, 2);
        __builtin_prefetch(ahead.second + 64 * line, 0, 2);
        if (++line == ahead.lines) {
          line = 0;
          ahead.first += ahead.row, ahead.second += ahead.row;
        }
      }
      vf loaded[C];
#pragma GCC unroll 2
      for (int j = 0; j < C; ++j) loaded[j] = load(b + j * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf s = splat(x[r * a.row]);
#pragma GCC unroll 2
        for (int j = 0; j < C; ++j) acc[r][j] += s * loaded[j];
      }
      b += step;
      x += a.step;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < C; ++j) {
      // Added last, so that long sums are sums of short ones.
      float* to = c[r] + column + j * W;
      store(to, add ? load(to) + acc[r][j] : acc[r][j]);
    }
}

using TileFunction = void (*)(const Segment*, int, int64_t, int, Strides, float* const*, int, bool);

template <bool Fetch, int C, int... R>
struct Tiles {
  static constexpr TileFunction table[] = {multiply_tile<Fetch, R, C>...};
};
#if SVITT_LANES == 16
template <bool Fetch, int C>
using AllTiles = Tiles<Fetch, C, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
template <bool Fetch, int C>
using AllTiles = Tiles<Fetch, C, 1, 2, 3, 4, 5, 6>;
#endif

/// rows x columns of C = or += the sum over segments; columns are rounded up to W, which C and the
/// panels of B must have room for. Rows are split evenly: a lone last row would wait for every sum.
template <bool Fetch = false>
SVITT_INLINE void multiply(int rows, int columns, const Segment* segments, int count, Strides a,
                           float* const* c, bool add) {
  const int vectors = (columns + W - 1) / W, groups = (rows + kRows - 1) / kRows;
  for (int g = 0; g < groups; ++g) {
    const int first = rows * g / groups, size = rows * (g + 1) / groups - first;
    for (int j = 0; j < vectors; j += 2) {
      const auto& table = vectors - j > 1 ? AllTiles<Fetch, 2>::table : AllTiles<Fetch, 1>::table;
      table[size - 1](segments, count, first, j / 2, a, c + first, j * W, add);
    }
  }
}

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

/// Panels over rows, transposed: B[k = dim][column = row]. Columns from `rows` up to `width`, a
/// multiple of W, are 0.
template <class T>
SVITT_INLINE void pack_columns(const T* data, int64_t stride, int rows, int dims, float* packed,
                               int width) {
  for (int i = 0; i < width; i += W) {
    float* panel = packed + static_cast<int64_t>(i / kPanel) * dims * kPanel + i % kPanel;
    for (int d = 0; d < dims; d += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        block[r] = i + r < rows ? load_some(data + (i + r) * stride + d, dims - d) : vf{};
      transpose(block);
      const int depth = dims - d < W ? dims - d : W;
      for (int r = 0; r < depth; ++r) store(panel + (d + r) * kPanel, block[r]);
    }
  }
}

/// One more column of panels made by `pack_columns`.
template <class T>
SVITT_INLINE void pack_column(const T* row, int dims, float* packed, int column) {
  float* to = packed + static_cast<int64_t>(column / kPanel) * dims * kPanel + column % kPanel;
  for (int d = 0; d < dims; ++d) to[d * kPanel] = to_float(row[d]);
}

/// Bring the row at p to the cache before it is needed.
template <bool Write, class T>
SVITT_INLINE void prefetch_row(const T* p, int dims) {
  const char* from = reinterpret_cast<const char*>(p);
  for (int byte = 0; byte < dims * static_cast<int>(sizeof(T)); byte += 64)
    __builtin_prefetch(from + byte, Write ? 1 : 0, 2);
}

/// Plain rows of `width` floats, padded with 0 to a multiple of W.
template <class T>
SVITT_INLINE void copy_rows(const T* data, int64_t stride, int rows, int dims, float* to,
                            int width) {
  for (int i = 0; i < rows; ++i)
    for (int d = 0; d < dims; d += W)
      store(to + i * width + d, load_some(data + i * stride + d, dims - d));
}

template <class T>
SVITT_INLINE void write_row(T* to, const float* from, int dims, float factor) {
  for (int d = 0; d < dims; ++d) from_float(to + d, from[d] * factor);
}

SVITT_KERNELS_END
