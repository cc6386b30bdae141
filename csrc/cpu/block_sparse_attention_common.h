// What forward and backward share: the gathered key list of a row block, logits and bias.
// Included inside namespace svitt::SVITT_ISA after gemm.h.

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr int kColumns = 512;  // keys per chunk: the logits of kRows rows stay in the L1 cache
constexpr int kRowTile = 64;   // query rows per pass

/// A bump allocator; every array is aligned to a vector.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    for (int i = 0; i < used_; ++i) ::operator delete(kept_[i], std::align_val_t(64));
  }
  float* floats(int64_t count) { return static_cast<float*>(take(count * 4)); }
  int32_t* ints(int64_t count) { return static_cast<int32_t*>(take(count * 4)); }
  void* take(int64_t bytes) {
    void* p = ::operator new(static_cast<size_t>(bytes) + 64, std::align_val_t(64));
    return kept_[used_++] = p;
  }

 private:
  void* kept_[24];
  int used_ = 0;
};

/// One row block of one (batch, head): which rows, and an iterator over the keys they attend.
struct RowBlock {
  int64_t b, h;
  int row, rows;  // existing query rows [row, row + rows)
  int end;        // rows up to here belong to the block, existing or not
  bool global;
  // Iteration over keys: the globals, then each listed block (all tokens for the globals).
  const int32_t* list;
  int listed, next, offset, length, num_global, block_size;

  template <class P>
  void start(const P& p, int64_t batch, int64_t head, int64_t index) {
    b = batch;
    h = head;
    global = p.num_global > 0 && index == 0;
    const int64_t block = index - (p.num_global > 0 ? 1 : 0);
    length = static_cast<int>(p.length(b));
    num_global = p.num_global;
    block_size = p.block_size;
    row = global ? 0 : static_cast<int>(num_global + block * block_size);
    const int64_t limit = global ? num_global : row + block_size;
    end = static_cast<int>(limit < p.tokens ? limit : p.tokens);
    rows = (end < length ? end : length) - row;
    if (rows < 0) rows = 0;
    const int64_t r = (b * p.keys.batch + h * p.keys.head) + block;
    list = global ? nullptr : p.keys.numbers + r * p.keys.width;
    listed = global ? 0 : p.keys.counts[r];
    rewind();
  }
  void rewind() { next = -1, offset = 0; }

  /// Up to `room` further keys; returns how many.
  int gather(int32_t* token, int room) {
    int count = 0;
    while (count < room && next < listed) {
      int first = 0, last = global ? length : num_global;
      if (next >= 0) {
        first = num_global + list[next] * block_size;
        last = first + block_size;
      }
      if (last > length) last = length;
      first += offset;
      while (first < last && count < room) token[count++] = first++, ++offset;
      if (first >= last) ++next, offset = 0;
    }
    return count;
  }
};

SVITT_INLINE vi lane_numbers() {
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}

/// The bias of a chunk's columns, described once and applied to every row.
///
/// Within one vector the keys' codes mostly form a few runs of consecutive numbers (rows of the grid); a
/// run is one unaligned load from the reversed table. Vectors with more runs go lane by lane.
struct BiasColumns {
  static constexpr int kRuns = 3;
  struct Runs {
    int count;              // 0: lane by lane
    int32_t offset[kRuns];  // the code that lane 0 would have in this run
    int32_t first[kRuns];   // the run's first lane
  };
  Runs runs[kColumns / W];
  int32_t code[kColumns];
  int count, globals, first_global, num_global;
  int64_t extra;  // where the rows of the globals start in a rearranged table
  const int32_t* codes;
  int32_t centre;

  template <class P>
  void bind(const P& p, int64_t b) {
    codes = p.codes + b * p.codes_stride;
    centre = static_cast<int32_t>((p.table_rows - 1) / 2) + kTablePad;
    extra = p.table_rows + 2 * kTablePad;
    num_global = p.num_global;
  }

  void describe(const int32_t* token, int n) {
    count = n;
    globals = 0;
    first_global = n > 0 ? token[0] : 0;
    while (globals < n && token[globals] < num_global) ++globals;
    for (int i = globals; i < n; ++i) code[i] = codes[token[i] - num_global];
    for (int i = 0; i < n; i += W) find_runs(i, runs[i / W]);
  }

  /// Bias of the token with code `row_code` (shifted by `centre`) against vector j.
  SVITT_INLINE vf token_row(const float* table, int32_t row_code, int j) const {
    const Runs& r = runs[j];
    vf bias;
    if (r.count > 0) {
      const float* from = table + row_code;
      bias = load(from + r.offset[0]);
      for (int i = 1; i < r.count; ++i)
        bias = lane_numbers() >= r.first[i] ? load(from + r.offset[i]) : bias;
    } else {
      for (int lane = 0; lane < W; ++lane) bias[lane] = table[row_code + code[j * W + lane]];
    }
    for (int i = j * W; i < globals && i < (j + 1) * W; ++i)
      bias[i % W] = table[extra + num_global + first_global + i];
    return bias;
  }

  /// Bias of global `a` against vector j.
  SVITT_INLINE vf global_row(const float* table, int a, int j) const {
    vf bias = splat(table[extra + a]);
    for (int i = j * W; i < globals && i < (j + 1) * W; ++i)
      bias[i % W] = table[extra + 2 * num_global + a * num_global + first_global + i];
    return bias;
  }

  /// Add the logits' gradient to the table's, the transpose of `token_row`.
  SVITT_INLINE void add_token_row(float* table, int32_t row_code, int j, vf grad) const {
    for (int i = j * W; i < globals && i < (j + 1) * W; ++i) {
      table[extra + num_global + first_global + i] += grad[i % W];
      grad[i % W] = 0.0f;
    }
    const Runs& r = runs[j];
    if (r.count > 0) {
      for (int i = 0; i < r.count; ++i) {
        const int32_t end = i + 1 < r.count ? r.first[i + 1] : W;
        const vi lanes = lane_numbers();
        float* to = table + row_code + r.offset[i];
        store(to, load(to) + ((lanes >= r.first[i]) & (lanes < end) ? grad : vf{}));
      }
    } else {
      for (int lane = 0; lane < W; ++lane) table[row_code + code[j * W + lane]] += grad[lane];
    }
  }
  SVITT_INLINE void add_global_row(float* table, int a, int j, vf grad) const {
    for (int i = j * W; i < globals && i < (j + 1) * W; ++i) {
      table[extra + 2 * num_global + a * num_global + first_global + i] += grad[i % W];
      grad[i % W] = 0.0f;
    }
    table[extra + a] += hsum(grad);
  }

 private:
  void find_runs(int at, Runs& r) {
    const int first = globals > at ? globals - at : 0, last = (count - at < W ? count - at : W) - 1;
    // Lanes without a token continue their neighbour's run; the table's padding makes that safe.
    for (int lane = 0; lane < W; ++lane) {
      if (first > last) code[at + lane] = codes[0] + lane;
      else if (lane < first) code[at + lane] = code[at + first] - (first - lane);
      else if (lane > last) code[at + lane] = code[at + last] + (lane - last);
    }
    r.count = 0;
    for (int lane = 0; lane < W; ++lane) {
      if (lane > 0 && code[at + lane] == code[at + lane - 1] + 1) continue;
      if (r.count == kRuns) {
        r.count = 0;
        return;
      }
      r.offset[r.count] = code[at + lane] - lane;
      r.first[r.count++] = lane;
    }
  }
};

/// Turn raw dot products of one row into logits: scale, bias, and -inf past the last column.
/// Returns the row's maximum.
template <class P>
SVITT_INLINE float finish_logits(const P& p, const RowBlock& block, const BiasColumns& bias,
                                 const float* table, int row, float* s, int n) {
  const int vectors = (n + W - 1) / W;
  const vf scale = splat(p.scale);
  vf most = splat(-kInfinity);
  const bool biased = table != nullptr;
  const int32_t code =
      biased && !block.global ? bias.centre - bias.codes[row - p.num_global] : 0;
  for (int j = 0; j < vectors; ++j) {
    vf x = load(s + j * W) * scale;
    if (biased) x += block.global ? bias.global_row(table, row, j) : bias.token_row(table, code, j);
    if ((j + 1) * W > n) x = lane_numbers() < n - j * W ? x : splat(-kInfinity);
    store(s + j * W, x);
    most = vmax(most, x);
  }
  return hmax(most);
}

/// exp(x - most) in place; returns the sum.
SVITT_INLINE float exponentiate(float* s, int n, float most) {
  const int vectors = (n + W - 1) / W;
  vf sum{};
  const vf m = splat(most);
  for (int j = 0; j < vectors; ++j) {
    const vf e = exp2_nonpositive((load(s + j * W) - m) * kLog2e);
    store(s + j * W, e);
    sum += e;
  }
  return hsum(sum);
}
