// C (rows x columns) = or += A B with B packed, accumulators in registers.
// Included inside namespace svitt::SVITT_ISA after simd.h.
//
// B is packed in panels of 2 W columns: panel p, row k starts at b + (p * depth + k) * 2 W. A is read by
// broadcast with any strides, so that a transposed A costs nothing. Rows of C are given by pointers.

#if defined(SVITT_LANES_16)
constexpr int kRows = 14;  // 28 accumulators, 2 of B, 1 broadcast: 31 of 32 registers
#else
constexpr int kRows = 6;  // 12 accumulators, 2 of B, 1 broadcast: 15 of 16 registers
#endif
constexpr int kPanel = 2 * W;

struct Operand {
  const float* data;
  int64_t row;    // stride between rows
  int64_t depth;  // stride along the summed dimension
};

template <int R, int C>
void multiply_tile(int depth, Operand a, const float* b, float* const* c, int column, bool add) {
  vf acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < C; ++j) acc[r][j] = add ? load(c[r] + column + j * W) : vf{};
  const float* x = a.data;
  for (int k = 0; k < depth; ++k) {
    vf panel[C];
#pragma GCC unroll 2
    for (int j = 0; j < C; ++j) panel[j] = load(b + j * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf s = splat(x[r * a.row]);
#pragma GCC unroll 2
      for (int j = 0; j < C; ++j) acc[r][j] += s * panel[j];
    }
    b += kPanel;
    x += a.depth;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < C; ++j) store(c[r] + column + j * W, acc[r][j]);
}

using TileFunction = void (*)(int, Operand, const float*, float* const*, int, bool);

template <int C, int... R>
struct Tiles {
  static constexpr TileFunction table[] = {multiply_tile<R, C>...};
};
#if defined(SVITT_LANES_16)
template <int C>
using AllTiles = Tiles<C, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
template <int C>
using AllTiles = Tiles<C, 1, 2, 3, 4, 5, 6>;
#endif

/// rows x columns of C; columns are rounded up to W, which C and the panels of B must have room for.
SVITT_INLINE void multiply(int rows, int columns, int depth, Operand a, const float* b,
                           float* const* c, bool add) {
  const int vectors = (columns + W - 1) / W;
  for (int r = 0; r < rows; r += kRows) {
    const int count = rows - r < kRows ? rows - r : kRows;
    const Operand part{a.data + r * a.row, a.row, a.depth};
    for (int j = 0; j < vectors; j += 2) {
      const float* panel = b + static_cast<int64_t>(j) * W * depth;
      const auto& table = vectors - j > 1 ? AllTiles<2>::table : AllTiles<1>::table;
      table[count - 1](depth, part, panel, c + r, j * W, add);
    }
  }
}

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

/// Where gathered rows of a (tokens, head_dim) matrix lie: row i is token[i].
template <class T>
struct Gather {
  const T* data;
  int64_t stride;
  const int32_t* token;
  int count;
};

/// Panels over head_dim: B[k = row][column = dim]. Padding columns are 0.
template <class T>
SVITT_INLINE void pack_rows(Gather<T> rows, int dims, float* packed) {
  for (int d = 0; d < dims; d += W) {
    float* to = packed + (static_cast<int64_t>(d / kPanel) * rows.count) * kPanel + d % kPanel;
    for (int i = 0; i < rows.count; ++i)
      store(to + i * kPanel, load_some(rows.data + rows.token[i] * rows.stride + d, dims - d));
  }
}

/// Panels over rows, transposed: B[k = dim][column = row]. Padding columns are 0.
template <class T>
SVITT_INLINE void pack_columns(Gather<T> rows, int dims, float* packed) {
  for (int i = 0; i < rows.count; i += W) {
    float* panel = packed + static_cast<int64_t>(i / kPanel) * dims * kPanel + i % kPanel;
    for (int d = 0; d < dims; d += W) {
      vf block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r)
        block[r] = i + r < rows.count
                       ? load_some(rows.data + rows.token[i + r] * rows.stride + d, dims - d)
                       : vf{};
      transpose(block);
      const int count = dims - d < W ? dims - d : W;
      for (int r = 0; r < count; ++r) store(panel + (d + r) * kPanel, block[r]);
    }
  }
}

/// Plain rows of `stride` floats, padded with 0 to a multiple of W.
template <class T>
SVITT_INLINE void copy_rows(const T* data, int64_t from_stride, int rows, int dims, float* to,
                            int stride) {
  for (int i = 0; i < rows; ++i)
    for (int d = 0; d < dims; d += W)
      store(to + i * stride + d, load_some(data + i * from_stride + d, dims - d));
}

template <class T>
SVITT_INLINE void write_row(T* to, const float* from, int dims, float factor) {
  for (int d = 0; d < dims; ++d) from_float(to + d, from[d] * factor);
}
