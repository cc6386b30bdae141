// The keys of one head as tiles, and the tiles that a row block attends.
#pragma once

#include "../common/attention_rows.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

constexpr int kColumns = 512;  // columns per chunk: the logits of kRows rows stay in the L1 cache
constexpr int kGlobalTile = 256;  // globals per tile where they have tiles of their own

/// One block of keys; its columns are its tokens, then its globals, then padding.
struct Tile {
  int first, tokens, first_global, globals;
};

/// How the keys of a sample are cut into tiles: one for each block and, where they do not fit into
/// the spare columns of the blocks, tiles for the globals. Spare columns are free: 56 tokens and
/// one global take the same four vectors of 16.
struct Tiling {
  int block_size, blocks, num_global, length;
  int width;         // columns of a tile
  int merged;        // globals that every block's tile carries
  int global_tiles;  // tiles after those of the blocks

  Tiling(const Attention& p, int unit) {
    block_size = p.block_size;
    blocks = p.blocks > 0 ? static_cast<int>(p.blocks) : 1;
    num_global = p.num_global;
    width = round_up(block_size, unit);
    merged = block_size + num_global <= width ? num_global : 0;
    global_tiles = merged == num_global ? 0 : (num_global + kGlobalTile - 1) / kGlobalTile;
    if (global_tiles > 0) {
      const int most = num_global < kGlobalTile ? num_global : kGlobalTile;
      if (most > width) width = round_up(most, unit);
    }
    length = 0;
  }
  int tiles() const { return blocks + global_tiles; }
  Tile tile(int i) const {
    const int present = length < num_global ? length : num_global;
    if (i >= blocks) {
      const int first = (i - blocks) * kGlobalTile;
      const int left = present - first;
      return {0, 0, first, left < 0 ? 0 : left < kGlobalTile ? left : kGlobalTile};
    }
    const int first = num_global + i * block_size, left = length - first;
    return {first,
            left < 0            ? 0
            : left < block_size ? left
                                : block_size,
            0, present < merged ? present : merged};
  }
};

/// Rows of a head as B of a product that sums over tokens: in place where they are contiguous fp32,
/// else in `buffer`, converted and padded to `width`.
struct HeadRows {
  const float* data;
  int64_t step;

  template <class T>
  void stage(const Matrix& m, int64_t b, int64_t h, int64_t length, int dims, float* buffer,
             int width) {
    const T* from = base<T>(m, b, h);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (m.token == dims && dims == width) {
        data = from, step = dims;
        return;
      }
    }
    copy_rows(from, m.token, static_cast<int>(length), dims, buffer, width);
    data = buffer, step = width;
  }
};

/// A head's rows tile by tile, transposed: B of a product that sums over the dims.
template <class T>
void stage_columns(const Tiling& tiling, const Matrix& m, int64_t b, int64_t h, int dims,
                   float* to) {
  const T* from = base<T>(m, b, h);
  const int64_t size = static_cast<int64_t>(round_up(tiling.width, kPanel)) * dims;
  for (int i = 0; i < tiling.tiles(); ++i, to += size) {
    const Tile t = tiling.tile(i);
    pack_columns(from + t.first * m.token, m.token, t.tokens, dims, to, tiling.width);
    for (int g = 0; g < t.globals; ++g)
      pack_column(from + (t.first_global + g) * m.token, dims, to, t.tokens + g);
  }
}

/// A tile within a chunk: columns [from, to) of the tile are attended.
struct Entry {
  int tile, column, from, to;
};

/// Up to kColumns columns of tiles side by side.
struct Chunk {
  int entries, columns;
  Entry entry[kColumns / W];
  float mask[kColumns];     // 0, or -inf where a column is not attended
  int32_t token[kColumns];  // or -1
};

/// The products that sum over a chunk's columns: A is `a` with one column per column of the chunk.
SVITT_INLINE int column_segments(const Chunk& chunk, const Tiling& tiling, const float* a,
                                 const HeadRows& rows, Segment* segments) {
  int count = 0;
  for (int i = 0; i < chunk.entries; ++i) {
    const Entry& e = chunk.entry[i];
    const Tile t = tiling.tile(e.tile);
    const int middle = e.to < t.tokens ? e.to : e.from > t.tokens ? e.from : t.tokens;
    if (e.from < middle)
      segments[count++] = {a + e.column + e.from, rows.data + (t.first + e.from) * rows.step,
                           rows.step, kPanel, middle - e.from};
    if (middle < e.to)
      segments[count++] = {a + e.column + middle,
                           rows.data + (t.first_global + middle - t.tokens) * rows.step, rows.step,
                           kPanel, e.to - middle};
  }
  return count;
}
constexpr int kSegments = 2 * kColumns / W;

/// One row block of one (batch, head), and an iterator over the tiles that it attends.
struct RowBlock {
  int64_t b, h;
  int row, rows;  // existing query rows [row, row + rows)
  int end;        // rows up to here belong to the block, existing or not
  bool global;
  const int32_t* list;
  int listed, next;
  bool globals_left;

  void start(const Attention& p, int64_t length, int64_t batch, int64_t head, int64_t index) {
    b = batch, h = head;
    global = p.num_global > 0 && index == 0;
    const int64_t block = index - (p.num_global > 0 ? 1 : 0);
    row = global ? 0 : static_cast<int>(p.num_global + block * p.block_size);
    const int64_t limit = global ? p.num_global : row + p.block_size;
    end = static_cast<int>(limit < p.tokens ? limit : p.tokens);
    rows = static_cast<int>(end < length ? end : length) - row;
    if (rows < 0) rows = 0;
    const int64_t r = b * p.keys.batch + h * p.keys.head + block;
    list = global ? nullptr : p.keys.numbers + r * p.keys.width;
    listed = global ? static_cast<int>(p.blocks) : p.keys.counts[r];
  }

  void rewind(const Tiling& tiling) {
    next = -tiling.global_tiles;
    globals_left = tiling.merged > 0;
  }

  /// Fill the chunk with the next tiles; false when none is left.
  bool gather(const Tiling& tiling, Chunk& chunk) {
    chunk.entries = chunk.columns = 0;
    while (chunk.columns + tiling.width <= kColumns && (next < listed || globals_left)) {
      // Merged globals ride on the first tile; without a listed block, on tile 0 alone.
      const bool alone = next >= listed;
      const int number = next < 0 ? tiling.tiles() + next : alone ? 0 : list ? list[next] : next;
      const Tile t = tiling.tile(number);
      const bool with_globals = next < 0 || globals_left;
      const int from = alone ? t.tokens : 0, to = t.tokens + (with_globals ? t.globals : 0);
      ++next;
      if (next > 0) globals_left = false;
      if (from < to) append(chunk, tiling, t, {number, chunk.columns, from, to});
    }
    return chunk.entries > 0;
  }

 private:
  static void append(Chunk& chunk, const Tiling& tiling, const Tile& t, Entry e) {
    for (int i = 0; i < tiling.width; i += W) {
      const vi column = lane_numbers() + i;
      const vi seen = (column >= e.from) & (column < e.to);
      const vi token = column < t.tokens ? column + t.first : column + (t.first_global - t.tokens);
      const vi listed = seen ? token : vi{} - 1;
      store(chunk.mask + e.column + i, seen ? vf{} : splat(-kInfinity));
      std::memcpy(chunk.token + e.column + i, &listed, sizeof listed);
    }
    chunk.entry[chunk.entries++] = e;
    chunk.columns += tiling.width;
  }
};

SVITT_KERNELS_END
