// Logits from dot products: scale, mask and the 3-D relative position bias.
// Included inside namespace svitt::SVITT_ISA after block_sparse_attention_tiles.h.

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
  const int32_t* token;
  const int32_t* codes;
  int first_global, globals;  // columns of globals are consecutive
  int num_global;
  int64_t extra;  // where the rows of the globals start in a rearranged table
  int32_t centre;

  void bind(const Attention& p, int64_t b) {
    codes = p.codes + b * p.codes_stride;
    centre = static_cast<int32_t>((p.table_rows - 1) / 2) + kTablePad;
    extra = p.table_rows + 2 * kTablePad;
    num_global = p.num_global;
  }

  void describe(const Chunk& chunk) {
    token = chunk.token;
    first_global = globals = 0;
    for (int i = 0; i < chunk.columns; ++i)
      if (token[i] >= 0 && token[i] < num_global && globals++ == 0) first_global = i;
    for (int i = 0; i < chunk.columns; i += W) find_runs(i, runs[i / W]);
  }

  int32_t row_code(int row) const { return centre - codes[row - num_global]; }

  /// Bias of the token with this row code against vector j.
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
    if (has_globals(j))
      for_globals(j, [&](int lane, int g) { bias[lane] = table[extra + num_global + g]; });
    return bias;
  }

  /// Bias of global `a` against vector j.
  SVITT_INLINE vf global_row(const float* table, int a, int j) const {
    vf bias = splat(table[extra + a]);
    const float* among = table + extra + 2 * num_global + static_cast<int64_t>(a) * num_global;
    if (has_globals(j)) for_globals(j, [&](int lane, int g) { bias[lane] = among[g]; });
    return bias;
  }

  /// Add the logits' gradient to the table's: the transpose of `token_row` and `global_row`.
  SVITT_INLINE void add_token_row(float* table, int32_t row_code, int j, vf grad) const {
    if (has_globals(j))
      for_globals(j, [&](int lane, int g) {
        table[extra + num_global + g] += grad[lane];
        grad[lane] = 0.0f;
      });
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
    float* among = table + extra + 2 * num_global + static_cast<int64_t>(a) * num_global;
    if (has_globals(j))
      for_globals(j, [&](int lane, int g) {
        among[g] += grad[lane];
        grad[lane] = 0.0f;
      });
    table[extra + a] += hsum(grad);
  }

 private:
  SVITT_INLINE bool has_globals(int j) const {
    return globals > 0 && first_global < (j + 1) * W && first_global + globals > j * W;
  }
  template <class F>
  SVITT_INLINE void for_globals(int j, F visit) const {
    for (int lane = 0; lane < W; ++lane) {
      const int column = j * W + lane;
      if (column >= first_global && column < first_global + globals) visit(lane, token[column]);
    }
  }

  void find_runs(int at, Runs& r) {
    // Lanes without a token continue their neighbour's run; the table's padding makes that safe.
    int known = -1;
    for (int lane = 0; lane < W; ++lane) {
      const bool coded = token[at + lane] >= num_global;
      if (coded) code[at + lane] = codes[token[at + lane] - num_global];
      else if (known >= 0) code[at + lane] = code[at + lane - 1] + 1;
      if (coded && known < 0) known = lane;
    }
    for (int lane = 0; lane < (known < 0 ? W : known); ++lane)
      code[at + lane] = known < 0 ? codes[0] + lane : code[at + known] - (known - lane);
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

/// Turn one row's dot products into logits in place; returns their maximum.
SVITT_INLINE float finish_logits(const Attention& p, const RowBlock& block, const Chunk& chunk,
                                 const BiasColumns& bias, const float* table, int row, float* s) {
  const vf scale = splat(p.scale);
  vf most = splat(-kInfinity);
  const bool token_bias = table != nullptr && !block.global;
  const int32_t code = token_bias ? bias.row_code(row) : 0;
  for (int c = 0; c < chunk.columns; c += W) {
    vf x = load(s + c) * scale + load(chunk.mask + c);
    if (token_bias) x += bias.token_row(table, code, c / W);
    else if (table != nullptr) x += bias.global_row(table, row, c / W);
    store(s + c, x);
    most = vmax(most, x);
  }
  return hmax(most);
}

/// exp(x - most) in place; returns the sum.
SVITT_INLINE float exponentiate(float* s, int columns, float most) {
  vf sum{};
  const vf m = splat(most);
  for (int c = 0; c < columns; c += W) {
    const vf e = exp_nonpositive<5>(load(s + c) - m);
    store(s + c, e);
    sum += e;
  }
  return hsum(sum);
}
