// What attention builds on: vectors, products, and rows of its operands and results.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "simd.h"

SVITT_KERNELS_BEGIN

template <class T>
const T* base(const Matrix& m, int64_t b, int64_t h) {
  return static_cast<const T*>(m.data) + b * m.batch + h * m.head;
}

/// Rows [row, row + rows) of a head by number, null past them.
template <class T>
SVITT_INLINE auto some_rows(const Matrix& m, int64_t b, int64_t h, int64_t row, int rows) {
  const T* data = base<T>(m, b, h) + row * m.token;
  return [=, step = m.token](int r) { return r < rows ? data + r * step : nullptr; };
}

/// Row of a result (batch, tokens, heads, head_dim).
template <class T>
SVITT_INLINE T* result_row(const AttentionInputs& p, void* result, int64_t tokens, int64_t b,
                           int64_t h, int64_t token) {
  return static_cast<T*>(result) + ((b * tokens + token) * p.heads + h) * p.head_dim;
}

/// Log-sum-exp of some of kLanes rows, in two floats. Lanes without a row get weight 0 by an
/// infinite one.
template <int kLanes>
SVITT_INLINE void split_sums(const double* lse, int rows, float* high, float* low) {
  for (int r = 0; r < kLanes; ++r) {
    high[r] = r < rows ? static_cast<float>(lse[r]) : kInfinity;
    low[r] = r < rows ? static_cast<float>(lse[r] - high[r]) : 0.0f;
  }
}

/// delta = rowsum(dO O) of rows packed by `pack_columns`.
///
/// It is summed over the dims one by one, as the product dO V is: where a row has a single key, and
/// O is V, the two are equal to the last bit and their difference is 0, as it must be.
SVITT_INLINE void sum_products(const float* out, const float* grad_out, int columns, int dims,
                               float* delta) {
  for (int c = 0; c < columns; c += W) {
    const int64_t at = static_cast<int64_t>(c / kPanel) * dims * kPanel + c % kPanel;
    vf sum{};
    for (int d = 0; d < dims; ++d)
      sum += load(out + at + d * kPanel) * load(grad_out + at + d * kPanel);
    store(delta + c, sum);
  }
}

SVITT_KERNELS_END
