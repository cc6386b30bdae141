// What the contrastive ops share on the host: the kernels of this processor, and packed inputs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <vector>

#include "info_nce.h"
#include "isa.h"
#include "tensors.h"

namespace svitt {

using torch::stable::parallel_for;
constexpr int64_t kGrain = 64;  // rows that are worth a thread

struct ContrastKernels {
  decltype(&generic::contrast_pack_queries) pack_queries;
  decltype(&generic::contrast_pack_keys) pack_keys;
  decltype(&generic::contrast_forward) forward;
  decltype(&generic::contrast_backward_keys) backward_keys;
  decltype(&generic::contrast_backward_queries) backward_queries;
  decltype(&generic::contrast_write_keys) write_keys;
  decltype(&generic::contrast_sample) sample;
  decltype(&generic::contrast_rank) rank;
  decltype(&generic::contrast_queue_centres) queue_centres;
  decltype(&generic::contrast_queue) queue;
  decltype(&generic::contrast_queue_finish) queue_finish;
};

#define SVITT_KERNELS(ISA) \
  {ISA::contrast_pack_queries,     ISA::contrast_pack_keys, \
   ISA::contrast_forward,          ISA::contrast_backward_keys, \
   ISA::contrast_backward_queries, ISA::contrast_write_keys, \
   ISA::contrast_sample,           ISA::contrast_rank, \
   ISA::contrast_queue_centres,    ISA::contrast_queue, \
   ISA::contrast_queue_finish}
inline ContrastKernels contrast_kernels() {
  const Isa best = isa();
#if defined(__x86_64__)
  if (best >= Isa::avx512) return SVITT_KERNELS(avx512);
  if (best == Isa::avx2) return SVITT_KERNELS(avx2);
#endif
  (void)best;
  return SVITT_KERNELS(generic);
}
#undef SVITT_KERNELS

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

/// Ids as small numbers: equal where the ids are, so that kernels compare 32 bits.
struct Ids {
  std::vector<int32_t> query, key;

  void bind(Contrast& p, const OptionalTensor& query_ids, const OptionalTensor& key_ids) {
    if (!query_ids.has_value()) return;
    const int64_t *of_queries = query_ids->const_data_ptr<int64_t>(),
                  *of_keys = key_ids->const_data_ptr<int64_t>();
    std::vector<int64_t> known(of_keys, of_keys + p.keys);
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    const auto number = [&](int64_t id) {
      const auto at = std::lower_bound(known.begin(), known.end(), id);
      return static_cast<int32_t>(at != known.end() && *at == id ? at - known.begin()
                                                                 : known.end() - known.begin());
    };
    std::transform(of_queries, of_queries + p.queries, std::back_inserter(query), number);
    std::transform(of_keys, of_keys + p.keys, std::back_inserter(key), number);
    p.query_ids = query.data();
    p.key_ids = key.data();
  }
};

/// Inputs of either direction, and the fp32 copies that both need.
template <class P>
struct ContrastProblem {
  P p{};
  Ids ids;
  std::unique_ptr<Buffer> rows, columns, query_panels, key_panels;

  ContrastProblem(const Tensor& query, const Tensor& key, const OptionalTensor& query_ids,
                  const OptionalTensor& key_ids, int64_t first_row) {
    p.dtype = dtype("info_nce", query);
    p.queries = query.size(0), p.keys = key.size(0), p.dim = static_cast<int>(query.size(1));
    p.query = query.const_data_ptr(), p.key = key.const_data_ptr();
    p.query_step = query.stride(0), p.key_step = key.stride(0);
    p.first_row = first_row;
    ids.bind(p, query_ids, key_ids);
  }
  void pack(const ContrastKernels& k, bool panels) {
    if (p.dtype == Dtype::f32) {
      p.rows = const_cast<float*>(static_cast<const float*>(p.query));  // read in place
      p.row_step = p.query_step;
    } else {
      rows = std::make_unique<Buffer>(p.queries * p.dim);
      p.rows = rows->get(), p.row_step = p.dim;
    }
    columns = std::make_unique<Buffer>(p.padded_keys() * p.dim);
    p.columns = columns->get();
    if (panels) {
      query_panels = std::make_unique<Buffer>(p.queries * p.padded_dim());
      key_panels = std::make_unique<Buffer>(p.padded_keys() * p.padded_dim());
    }
    float *of_queries = panels ? query_panels->get() : nullptr,
          *of_keys = panels ? key_panels->get() : nullptr;
    parallel_for(0, p.queries, kGrain,
                 [&](int64_t a, int64_t b) { k.pack_queries(p, of_queries, a, b); });
    parallel_for(0, p.tiles(), 1, [&](int64_t a, int64_t b) { k.pack_keys(p, of_keys, a, b); });
  }
};

}  // namespace svitt
