// Token pruning on the CPU: an exact selection per sample, then copies of rows.
//
// Selection. Scores become int32 keys that order as they do; the threshold, the largest key that at
// least `keep` tokens reach, is found bit by bit with one vectorised count a bit (16 for halves),
// and one walk in the order of the sequence emits the survivors. Counting costs 3 ns a token
// whatever the scores; a radix select by 256-bin histograms took 2 to 5, the most where many tie.
// Either is below 1 % of the time that moving rows of 768 takes, so that variants for wider
// vectors (AVX-512 counts twice as fast) do not pay.
//
// Rows. Each is copied by memcpy, forward from the survivor's place and backward, through the
// inverse map, from its slot; all of a result is written once. First touch of fresh memory costs
// more than the copy: 9,400 page faults, half the time, for the gradient of 38 MB at (8, 1568,
// 768), hence `ask_for_huge_pages`. What did not help: non-temporal stores (1.1 times faster into
// memory that was in use before, 0.7 into fresh pages, which the system has just zeroed in cache),
// prefetching the next row.
//
// Shapes, strides and `keep` were checked in Python.

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "../../library.h"
#include "../common/pages.h"
#include "../common/tensors.h"

namespace svitt {
namespace {

/// How a floating dtype's bits lie in the upper end of 32.
struct Format {
  int bits;
  uint32_t infinity;
};

Format format(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return {32, 0x7f800000};
    case ScalarType::BFloat16: return {16, 0x7f800000};
    case ScalarType::Half: return {16, 0x7c000000};
    default: STD_TORCH_CHECK(false, "scores must be float32, float16 or bfloat16");
  }
}

/// An int that orders as the number does: 0 and -0 are equal, NaN is less than all.
int32_t order_key(uint32_t bits, Format f) {
  if (bits << 1 == 0) bits = 0;
  const uint32_t magnitude = f.bits == 32 ? 0x7fffffff : 0x7fff0000;
  const uint32_t ordered = bits >> 31 ? bits ^ magnitude : bits;
  const bool nan = (bits & 0x7fffffff) > f.infinity;
  return nan ? std::numeric_limits<int32_t>::min() : static_cast<int32_t>(ordered);
}

void order_keys(const void* scores, int64_t n, Format f, int32_t* keys) {
  if (f.bits == 32) {
    const auto* from = static_cast<const uint32_t*>(scores);
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(from[i], f);
  } else {
    const auto* from = static_cast<const uint16_t*>(scores);
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(static_cast<uint32_t>(from[i]) << 16, f);
  }
}

/// The largest key that at least `keep` of the keys reach.
int32_t threshold(const int32_t* keys, int64_t n, int64_t keep, int bits) {
  constexpr uint32_t kSign = 0x80000000;  // flipped, keys order as unsigned numbers
  uint32_t found = 0;
  for (int bit = 31; bit >= 32 - bits; --bit) {
    const uint32_t trial = found | 1u << bit;
    const auto least = static_cast<int32_t>(trial ^ kSign);
    int64_t reached = 0;
    constexpr int64_t kChunk = 1 << 20;  // inside, 32-bit counts: twice the lanes
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t end = std::min(n, begin + kChunk);
      int32_t count = 0;
      for (int64_t i = begin; i < end; ++i) count += keys[i] >= least;
      reached += count;
    }
    if (reached >= keep) found = trial;
  }
  return static_cast<int32_t>(found ^ kSign);
}

struct Selection {
  const char* scores;
  int64_t row_bytes;
  Format format;
  int64_t num_tokens, keep;
  int64_t* indices;      // (batch, keep)
  int32_t* inverse;      // (batch, num_tokens), or null
  const int32_t* codes;  // (1 or batch, num_tokens), or null
  int64_t codes_stride;  // 0 broadcasts
  int32_t* kept_codes;   // (batch, keep)
};

void select_sample(const Selection& p, int64_t b, int32_t* keys) {
  const int64_t n = p.num_tokens, keep = p.keep;
  order_keys(p.scores + b * p.row_bytes, n, p.format, keys);
  const int32_t least = threshold(keys, n, keep, p.format.bits);
  int64_t ties = keep;
  for (int64_t i = 0; i < n; ++i) ties -= keys[i] > least;
  int64_t* indices = p.indices + b * keep;
  int32_t* inverse = p.inverse == nullptr ? nullptr : p.inverse + b * n;
  int64_t slot = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool tie = keys[i] == least;
    const bool kept = keys[i] > least || (tie && ties > 0);
    ties -= tie;
    if (inverse != nullptr) inverse[i] = kept ? static_cast<int32_t>(slot) : -1;
    if (kept) indices[slot++] = i;
  }
  if (p.codes == nullptr) return;
  const int32_t* codes = p.codes + b * p.codes_stride;
  for (int64_t s = 0; s < keep; ++s) p.kept_codes[b * keep + s] = codes[indices[s]];
}

/// Work that is less than some 10 us stays with one thread.
int64_t grain(int64_t cost, int64_t enough) {
  return std::max<int64_t>(1, enough / std::max<int64_t>(1, cost));
}

void select(const Selection& p, int64_t batch) {
  auto samples = [&](int64_t begin, int64_t end) {
    std::vector<int32_t> keys(p.num_tokens);
    for (int64_t b = begin; b < end; ++b) select_sample(p, b, keys.data());
  };
  torch::stable::parallel_for(0, batch, grain(p.num_tokens, 8192), samples);
}

Selection selection(const Tensor& scores, int64_t keep, Tensor& indices) {
  Selection p{};
  p.format = format(scores);
  p.scores = static_cast<const char*>(scores.const_data_ptr());
  p.row_bytes = scores.stride(0) * (p.format.bits / 8);
  p.num_tokens = scores.size(1), p.keep = keep;
  p.indices = indices.mutable_data_ptr<int64_t>();
  return p;
}

struct Rows {  // (batch, rows, dim) with a last stride of 1; strides in bytes
  char* data;
  int64_t batch, row;
};

Rows rows_of(const Tensor& x) {
  const auto bytes = static_cast<int64_t>(x.element_size());
  auto* data = const_cast<char*>(static_cast<const char*>(x.const_data_ptr()));
  return {data, x.stride(0) * bytes, x.stride(1) * bytes};
}

/// Write each row of `out` once: `source(b, r)` is the row of `from` that it copies, -1 for zeros.
template <class Source>
void gather_rows(const Tensor& from, Tensor& out, const Source& source) {
  const int64_t rows = out.size(1), bytes = out.size(2) * out.element_size();
  const Rows in = rows_of(from), to = rows_of(out);
  ask_for_huge_pages(to.data, out.size(0) * rows * bytes);
  auto range = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / rows, r = item % rows, taken = source(b, r);
      char* row = to.data + item * bytes;
      if (taken < 0)
        std::memset(row, 0, bytes);
      else
        std::memcpy(row, in.data + b * in.batch + taken * in.row, bytes);
    }
  };
  if (bytes > 0)
    torch::stable::parallel_for(0, out.size(0) * rows, grain(bytes, 128 * 1024), range);
}

Tensor select_op(Tensor scores, int64_t keep) {
  Tensor indices = empty(scores, {scores.size(0), keep}, ScalarType::Long);
  select(selection(scores, keep, indices), scores.size(0));
  return indices;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_op(Tensor tokens, Tensor scores, int64_t keep,
                                                    int64_t num_global, OptionalTensor codes) {
  const int64_t batch = scores.size(0), num_tokens = scores.size(1);
  Tensor indices = empty(scores, {batch, keep}, ScalarType::Long);
  Tensor inverse = empty(scores, {batch, num_tokens}, ScalarType::Int);
  Selection p = selection(scores, keep, indices);
  p.inverse = inverse.mutable_data_ptr<int32_t>();
  Tensor kept_codes = empty(inverse, {0});
  if (codes.has_value()) {
    kept_codes = empty(inverse, {batch, keep});
    p.codes = codes->const_data_ptr<int32_t>();
    p.codes_stride = codes->size(0) > 1 ? num_tokens : 0;
    p.kept_codes = kept_codes.mutable_data_ptr<int32_t>();
  }
  select(p, batch);
  Tensor out = empty(tokens, {batch, num_global + keep, tokens.size(2)});
  gather_rows(tokens, out, [&](int64_t b, int64_t r) {
    return r < num_global ? r : num_global + p.indices[b * keep + r - num_global];
  });
  return {out, indices, inverse, kept_codes};
}

Tensor backward_op(Tensor grad_out, Tensor inverse, int64_t num_global) {
  const int64_t batch = inverse.size(0), num_tokens = inverse.size(1);
  const int32_t* slots = inverse.const_data_ptr<int32_t>();
  Tensor grad = empty(grad_out, {batch, num_global + num_tokens, grad_out.size(2)});
  gather_rows(grad_out, grad, [&](int64_t b, int64_t r) -> int64_t {
    if (r < num_global) return r;
    const int64_t slot = slots[b * num_tokens + r - num_global];
    return slot < 0 ? -1 : num_global + slot;
  });
  return grad;
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&svitt::select_op));
  m.impl("prune_tokens", TORCH_BOX(&svitt::prune_op));
  m.impl("prune_tokens_backward", TORCH_BOX(&svitt::backward_op));
}
