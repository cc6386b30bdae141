// What the contrastive ops share on the host: ids and packed inputs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "contrast.h"
#include "dispatch.h"
#include "dtype.h"
#include "tensors.h"

namespace svitt {

using torch::stable::parallel_for;
constexpr int64_t kGrain = 64;  // rows that are worth a thread

constexpr float kLogitLimit = 1e9f;  // `LOGIT_LIMIT` of the reference

/// Similarities times `scale` are logits; those of `limit` or more are none, nor are infinities and
/// NaN, and none are unless the temperature is positive and finite.
inline void set_temperature(Contrast& p, const Tensor& temperature) {
  const float t = *temperature.const_data_ptr<float>();
  p.scale = 1.0f / t;
  p.limit = t > 0.0f && t < HUGE_VALF ? kLogitLimit * t : -1.0f;
}

/// Memory that nobody initialises, aligned to a vector.
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(::operator new(sizeof(float) * count, std::align_val_t(64)))) {}
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> data_;
};

/// Ids as small numbers, equal where the ids are, so that kernels compare 32 bits; what no query
/// has is one number.
class Ids {
 public:
  explicit Ids(const Tensor& query_ids)
      : known_(query_ids.const_data_ptr<int64_t>(),
               query_ids.const_data_ptr<int64_t>() + query_ids.size(0)) {
    std::sort(known_.begin(), known_.end());
    known_.erase(std::unique(known_.begin(), known_.end()), known_.end());
  }
  std::vector<int32_t> number(const Tensor& ids) const {
    const int64_t* from = ids.const_data_ptr<int64_t>();
    std::vector<int32_t> to(ids.size(0));
    parallel_for(0, ids.size(0), 4096, [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b; ++i) {
        const auto at = std::lower_bound(known_.begin(), known_.end(), from[i]);
        to[i] = static_cast<int32_t>(at != known_.end() && *at == from[i] ? at - known_.begin()
                                                                          : known_.size());
      }
    });
    return to;
  }

 private:
  std::vector<int64_t> known_;
};

/// Inputs of either direction, and the fp32 copies that both need.
template <class P>
struct ContrastProblem {
  P p{};
  std::optional<Ids> ids;
  std::vector<int32_t> of_queries, of_keys;
  std::vector<Buffer> memory;
  float *query_panels = nullptr, *key_panels = nullptr;

  ContrastProblem(const char* op, const Tensor& query, const Tensor& key,
                  const OptionalTensor& query_ids, const OptionalTensor& key_ids,
                  int64_t first_row = 0) {
    p.dtype = dtype(op, query);
    p.queries = query.size(0), p.keys = key.size(0), p.dim = static_cast<int>(query.size(1));
    p.query = query.const_data_ptr(), p.key = key.const_data_ptr();
    p.query_step = query.stride(0), p.key_step = key.stride(0);
    p.first_row = first_row;
    if (!query_ids.has_value()) return;
    ids.emplace(*query_ids);
    of_queries = ids->number(*query_ids), of_keys = ids->number(*key_ids);
    p.query_ids = of_queries.data(), p.key_ids = of_keys.data();
  }
  float* take(int64_t count) { return memory.emplace_back(count).get(); }

  /// The queries in fp32: in place, or in a copy.
  void pack_queries(const PackKernels& k, Contrast& of) {
    const bool copied = of.dtype != Dtype::f32;
    of.rows = copied ? take(of.queries * of.dim)
                     : const_cast<float*>(static_cast<const float*>(of.query));
    of.row_step = copied ? of.dim : of.query_step;
    parallel_for(0, of.queries, kGrain,
                 [&](int64_t a, int64_t b) { k.queries(of, query_panels, a, b); });
  }

  enum Form { kPlain = 1, kColumns = 2, kValues = 4 };
  TileOperands pack_tiles(const PackKernels& k, const void* data, int64_t step, int64_t count,
                          int forms) {
    TileOperands to{p.dtype, data, step, count, p.dim, nullptr, nullptr, nullptr};
    const auto form = [&](Form one) {
      const int64_t size = to.groups() * 16 * to.padded_dim() * parts_of(p.dtype);
      return forms & one ? reinterpret_cast<uint16_t*>(take(size)) : nullptr;
    };
    to.plain = form(kPlain), to.columns = form(kColumns), to.values = form(kValues);
    parallel_for(0, to.groups(), 2, [&](int64_t a, int64_t b) { k.tiles(to, a, b); });
    return to;
  }

  /// All that a matrix of similarities needs, and panels for its gradient.
  void pack(const PackKernels& k, bool panels) {
    if (k.tiles != nullptr) {
      const int values = panels ? kValues : 0;
      p.tiled_queries = pack_tiles(k, p.query, p.query_step, p.queries, kPlain | values);
      p.tiled_keys = pack_tiles(k, p.key, p.key_step, p.keys, kColumns | values);
      return;
    }
    if (panels) {
      query_panels = take(p.queries * p.padded_dim());
      key_panels = take(p.padded_keys() * p.padded_dim());
    }
    pack_queries(k, p);
    p.columns = take(p.padded_keys() * p.dim);
    parallel_for(0, p.tiles(), 1, [&](int64_t a, int64_t b) { k.keys(p, key_panels, a, b); });
  }

  /// Where the gradients go to, and the memory that they are summed in.
  void want_gradients(const GradientKernels& k, const Tensor& grad_query, const Tensor& grad_key) {
    p.query_panels = query_panels, p.key_panels = key_panels;
    p.grad_dtype = svitt::dtype("gradient", grad_query);
    p.grad_query = grad_query.mutable_data_ptr(), p.grad_key = grad_key.mutable_data_ptr();
    const int64_t width = k.tiles != nullptr ? kRoundedStride / 2 * parts_of(p.dtype) : kGradStride;
    p.grads = take(p.tiles() * p.chunk_rows() * width);
    p.rounded = reinterpret_cast<uint16_t*>(p.grads);
    p.grad_keys = take(p.padded_keys() * p.padded_dim());
    p.grad_queries = take(p.chunk_rows() * p.padded_dim());
  }

  /// Chunk by chunk the op's own kernel, and after it the gradient if wanted.
  void sweep(const GradientKernels& k, void (*weigh)(const P&, int64_t, int64_t, int64_t)) {
    const bool gradients = p.grad_query != nullptr;
    for (int64_t chunk = 0; chunk < p.chunks(); ++chunk) {
      parallel_for(0, p.tiles(), 1, [&](int64_t a, int64_t b) { weigh(p, chunk, a, b); });
      const int64_t rows = std::min(p.queries - chunk * kQueryChunk, kQueryChunk + 0L);
      if (gradients)
        parallel_for(0, rows, kGrain, [&](int64_t a, int64_t b) { k.sum_queries(p, chunk, a, b); });
    }
    if (gradients)
      parallel_for(0, p.keys, kGrain, [&](int64_t a, int64_t b) { k.write_keys(p, a, b); });
  }
};

/// What the kernels find for each query.
template <class Kernels>
Tensor search(ContrastProblem<ContrastSearch>& problem, const Tensor& query) {
  ContrastSearch& p = problem.p;
  const Kernels& k = choose<Kernels>(p);
  Tensor found = empty(query, {p.queries}, ScalarType::Long);
  p.found = found.mutable_data_ptr<int64_t>();
  problem.pack(k, false);
  parallel_for(0, p.queries, kGrain, [&](int64_t a, int64_t b) { k.find(p, a, b); });
  return found;
}

}  // namespace svitt
