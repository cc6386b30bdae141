// Backward for bf16 on the AMX matrix tiles: the sweep of cross_attention_backward.h with its five
// products on 16 x 16 tiles.
// Included inside namespace svitt::avx512 after cross_attention_backward.h and
// cross_attention_amx.h.
//
// Keys are the rows of four products, so that K, V, the weights and the slopes serve as left
// operands as they are, against queries and upstream gradients packed once. The gradient of the
// queries alone needs K packed and the slopes turned. Weights and slopes are rounded to bf16 for
// the products; logits, their gradients and all sums stay in fp32.
//
// What remains is memory: the rows of the results lie `heads` rows apart, where streaming stores
// took half the time of plain ones, and less than plain ones with their lines prefetched.
//
// Tried, without gain: leaving out the upper 16 lanes where there are at most 16 queries, several
// heads in turn for each tile of keys; prefetching nothing (1.05 to 1.15 times slower), or one tile
// ahead instead of two (1.02); streaming all rows of a tile at its end (1.05).

struct CrossBackwardTileScratch {
  Arena arena;
  int dims;
  // Packed for products over dims, and over queries.
  uint16_t *query, *grad_out, *query_pairs, *grad_pairs;
  uint16_t *keys, *values, *key_pairs;
  uint16_t *weights, *slopes;    // (kKeyTile, kQueryTile)
  uint16_t* turned;              // slopes, (kQueryTile, kKeyTile)
  float *logits, *products;      // of K Q^T and of V dO^T, (kKeyTile, kQueryTile)
  float *lse, *lse_low, *delta;  // of all queries
  float *grad_query, *grad_key, *grad_value;

  explicit CrossBackwardTileScratch(const CrossBackward& p) : dims(p.head_dim) {
    const int64_t lanes = (p.queries + kQueryTile - 1) / kQueryTile * kQueryTile;
    query = arena.take<uint16_t>(lanes * dims);
    grad_out = arena.take<uint16_t>(lanes * dims);
    query_pairs = arena.take<uint16_t>(lanes * dims);
    grad_pairs = arena.take<uint16_t>(lanes * dims);
    keys = arena.take<uint16_t>(kKeyTile * dims);
    values = arena.take<uint16_t>(kKeyTile * dims);
    key_pairs = arena.take<uint16_t>(kKeyTile * dims);
    weights = arena.take<uint16_t>(kKeyTile * kQueryTile);
    slopes = arena.take<uint16_t>(kKeyTile * kQueryTile);
    turned = arena.take<uint16_t>(kQueryTile * kKeyTile);
    logits = arena.take<float>(kKeyTile * kQueryTile);
    products = arena.take<float>(kKeyTile * kQueryTile);
    lse = arena.take<float>(lanes);
    lse_low = arena.take<float>(lanes);
    delta = arena.take<float>(lanes);
    grad_query = arena.take<float>(lanes * dims);
    grad_key = arena.take<float>(kKeyTile * dims);
    grad_value = arena.take<float>(kKeyTile * dims);
  }
};

/// Queries, upstream gradient, log-sum-exp and delta = rowsum(dO O) of a query tile.
///
/// delta is the diagonal of the tile product O dO^T, summed as V dO^T is: where a row has a single
/// key, and O is V, the two are equal to the last bit and their difference is 0, as it must be.
SVITT_INLINE void load_query_tiles(const CrossBackward& p, const KeyRange& range, int64_t row,
                                   int rows, CrossBackwardTileScratch& s) {
  const int lanes = round_up(rows, kTileRows), dims = s.dims;
  const int64_t at = row * dims, tile = kTile * kPairs;
  const auto reader = [&](const Matrix& m) {
    const uint16_t* data = base<uint16_t>(m, range.b, range.h) + row * m.token;
    return [=](int r) { return r < rows ? data + r * m.token : nullptr; };
  };
  const auto query = reader(p.query), grad = reader(p.grad_out), out = reader(p.out);
  pack_key_tiles(query, lanes, dims, s.query + at);
  pack_key_tiles(grad, lanes, dims, s.grad_out + at);
  pack_value_tiles(query, lanes, dims, s.query_pairs + at);
  pack_value_tiles(grad, lanes, dims, s.grad_pairs + at);
  load_sums(p, range, row, rows, s.lse, s.lse_low);
  for (int r = 0; r < lanes; r += kTileRows) {
    for (int i = 0; i < kTileRows; ++i)
      for (int d = 0; d < dims; d += kPairs)
        _mm512_storeu_si512(s.keys + i * dims + d, load_pairs(out(r + i), d));
    clear_tiles();
    multiply_tiles(dims / kPairs, s.keys, dims, s.grad_out + at + r * dims, tile, kTile * dims);
    store_tiles(s.products, kTileRows);
    for (int i = 0; i < kTileRows; ++i) s.delta[row + r + i] = s.products[i * (kTileRows + 1)];
  }
}

/// 32 sums rounded to bf16, in order.
SVITT_INLINE __m512i round_pairs(vf low, vf high) {
  const auto rounded =
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  __m512i bits;
  std::memcpy(&bits, &rounded, 64);
  return bits;
}

/// Weights and slopes, the scaled gradients of the logits, of n keys, zeros from there to `padded`.
/// Beside the weights of each key goes `fetch`.
template <class Fetch>
SVITT_INLINE void differentiate_pairs(const CrossBackwardTileScratch& s, int64_t row, int lanes,
                                      int n, int padded, float scale, const Fetch& fetch) {
  constexpr float kLog2e = 1.4426950408889634f;
  for (int c = 0; c < lanes; c += kPairs) {
    for (int j = 0; j < n; ++j) {
      if (c == 0) fetch(j);
      vf weight[2], slope[2];
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const int at = j * kQueryTile + c + k * W;
        const int64_t lane = row + c + k * W;
        const vf x = load(s.logits + at) * scale - load(s.lse + lane) - load(s.lse_low + lane);
        weight[k] = exp2_bf16(x * kLog2e);
        slope[k] = weight[k] * (load(s.products + at) - load(s.delta + lane)) * scale;
      }
      _mm512_store_si512(s.weights + j * kQueryTile + c, round_pairs(weight[0], weight[1]));
      _mm512_store_si512(s.slopes + j * kQueryTile + c, round_pairs(slope[0], slope[1]));
    }
    for (int j = n; j < padded; ++j) {
      _mm512_store_si512(s.weights + j * kQueryTile + c, _mm512_setzero_si512());
      _mm512_store_si512(s.slopes + j * kQueryTile + c, _mm512_setzero_si512());
    }
  }
}

/// Slopes with the queries as rows.
SVITT_INLINE void turn_slopes(const CrossBackwardTileScratch& s, int lanes, int padded) {
  alignas(64) uint16_t interleave[32];
  for (int i = 0; i < 32; ++i) interleave[i] = static_cast<uint16_t>(i / 2 + 32 * (i % 2));
  const __m512i order = _mm512_load_si512(interleave);
  for (int c = 0; c < lanes; c += kTile)
    for (int j = 0; j < padded; j += kPairs) {
      vf pairs[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const uint16_t* even = s.slopes + (j + 2 * i) * kQueryTile + c;
        const __m512i both = _mm512_permutex2var_epi16(
            _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(even))),
            order,
            _mm512_castsi256_si512(
                _mm256_load_si256(reinterpret_cast<const __m256i*>(even + kQueryTile))));
        pairs[i] = reinterpret_cast<vf>(both);
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) std::memcpy(s.turned + (c + i) * kKeyTile + j, &pairs[i], 64);
    }
}

/// C (rows x dims) = or += A B over `depth`, a multiple of 32; B packed by pack_value_tiles.
SVITT_INLINE void multiply_pairs(const uint16_t* a, int64_t a_stride, const uint16_t* b, int rows,
                                 int depth, int dims, float* c, bool add) {
  const int64_t tile = kTile * kPairs;
  for (int r = 0; r < rows; r += kTileRows)
    for (int d = 0; d < dims; d += kPairs) {
      float* to = c + r * dims + d;
      if (add) {
        load_tiles(to, dims);
      } else {
        clear_tiles();
      }
      multiply_tiles(depth / kPairs, a + r * a_stride, a_stride, b + d / kTile * tile,
                     dims / kTile * tile, tile);
      store_tiles(to, dims);
    }
}

/// A result is not read here again: written past the caches, its lines need not be fetched first.
SVITT_INLINE void stream_row(const float* from, uint16_t* to, int dims) {
  for (int d = 0; d < dims; d += kPairs)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + d),
                        round_pairs(load(from + d), load(from + d + W)));
}

/// `backward_tile` of cross_attention_backward.h.
void backward_tile_amx(const CrossBackward& p, const KeyRange& range, int64_t j, int n,
                       CrossBackwardTileScratch& s) {
  const int dims = s.dims, padded = round_up(n, kPairs);
  const TileKeys keys(p, p.key, range, j, n), values(p, p.value, range, j, n);
  const int64_t next = range.last - j < 2 * kKeyTile ? range.last : j + 2 * kKeyTile;
  const int count = static_cast<int>(range.last - next < kKeyTile ? range.last - next : kKeyTile);
  const TileKeys ahead[2] = {{p, p.key, range, next, count}, {p, p.value, range, next, count}};
  const int32_t* present = p.present_of(range.b);
  const auto result = [&](void* grad, int i) {
    const int64_t token = present == nullptr ? j + i : present[j + i];
    return result_row<uint16_t>(p, grad, p.keys, range.b, range.h, token);
  };
  pack_value_tiles(keys, padded, dims, s.key_pairs);
  each_query_tile(p, [&](int64_t, int64_t row, int rows) {
    const int lanes = round_up(rows, kTileRows);
    const int64_t at = row * dims;
    multiply_keys(keys, padded, s.query + at, lanes, dims, s.keys, s.logits);
    multiply_keys(values, padded, s.grad_out + at, lanes, dims, s.values, s.products);
    differentiate_pairs(s, row, lanes, n, padded, p.scale, [&](int i) {
      if (row > 0 || i >= count) return;
      prefetch_row<false>(ahead[0](i), dims);
      prefetch_row<false>(ahead[1](i), dims);
    });
    const auto add_gradient = [&](const uint16_t* from, const uint16_t* packed, float* sum,
                                  void* grad) {
      for (int r = 0; r < padded; r += kTileRows) {
        multiply_pairs(from + r * kQueryTile, kQueryTile, packed + at, kTileRows, lanes, dims,
                       sum + r * dims, row > 0);
        if (row + rows < p.queries) continue;
        for (int i = r; i < n && i < r + kTileRows; ++i)
          stream_row(sum + i * dims, result(grad, i), dims);
      }
    };
    add_gradient(s.weights, s.grad_pairs, s.grad_value, p.grad_value);
    turn_slopes(s, lanes, padded);
    add_gradient(s.slopes, s.query_pairs, s.grad_key, p.grad_key);
    multiply_pairs(s.turned, kKeyTile, s.key_pairs, lanes, padded, dims, s.grad_query + at,
                   j > range.first);
  });
}

void cross_backward_amx(const CrossBackward& p, int64_t begin, int64_t end) {
  const TileConfig config;
  _tile_loadconfig(&config);
  {
    CrossBackwardTileScratch s(p);
    cross_backward_items<bf16>(
        p, begin, end, s.grad_query, s.dims,
        [&](const KeyRange& range, int64_t row, int rows) {
          load_query_tiles(p, range, row, rows, s);
        },
        [&](const KeyRange& range, int64_t j, int n) { backward_tile_amx(p, range, j, n, s); });
  }
  _tile_release();
  _mm_sfence();  // streamed rows are seen by whoever sees that this is done
}
