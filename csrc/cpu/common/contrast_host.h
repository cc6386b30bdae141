// What the contrastive ops share on the host: the kernels of this processor, and packed inputs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <vector>

#include "contrast.h"
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
  void (*pack_tiles)(const TileOperands& to, int64_t begin, int64_t end);  // or null
};

#define SVITT_KERNELS(ISA) \
  {ISA::contrast_pack_queries,     ISA::contrast_pack_keys, \
   ISA::contrast_forward,          ISA::contrast_backward_keys, \
   ISA::contrast_backward_queries, ISA::contrast_write_keys, \
   ISA::contrast_sample,           ISA::contrast_rank, \
   ISA::contrast_queue_centres,    ISA::contrast_queue, \
   ISA::contrast_queue_finish,     nullptr}
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

/// The kernels of the losses, on matrix tiles where the processor has them for the dtype.
inline ContrastKernels loss_kernels(Dtype dtype) {
  ContrastKernels k = contrast_kernels();
#if defined(__x86_64__)
  if (isa() == Isa::amx && dtype == Dtype::bf16) {
    k.forward = avx512::contrast_forward_amx;
    k.backward_keys = avx512::contrast_backward_keys_amx;
    k.backward_queries = avx512::contrast_backward_queries_amx;
    k.queue = avx512::contrast_queue_amx;
    k.pack_tiles = avx512::contrast_pack_amx;
  }
#endif
  return k;
}

/// Similarities times `scale` are logits; those of `limit` or more are none, nor are infinities and
/// NaN, and none are unless the temperature is positive and finite. The number is
/// `LOGIT_LIMIT` of the reference.
inline void set_temperature(Contrast& p, const Tensor& temperature) {
  const float t = *temperature.const_data_ptr<float>();
  p.scale = 1.0f / t;
  p.limit = t > 0.0f && t < HUGE_VALF ? 1e9f * t : -1.0f;
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

/// Rows packed for the matrix tiles.
class TiledRows {
 public:
  enum Form { kPlain = 1, kColumns = 2, kValues = 4 };

  TiledRows(const ContrastKernels& k, const void* data, int64_t step, int64_t count, int dim,
            int forms)
      : operands_{data, step, count, dim, nullptr, nullptr, nullptr} {
    const int64_t groups = operands_.groups();
    if (forms & kPlain) operands_.plain = take();
    if (forms & kColumns) operands_.columns = take();
    if (forms & kValues) operands_.values = take();
    parallel_for(0, groups, 2, [&](int64_t a, int64_t b) { k.pack_tiles(operands_, a, b); });
  }
  const TileOperands& operands() const { return operands_; }

 private:
  uint16_t* take() {
    memory_.emplace_back(operands_.groups() * 32 * operands_.padded_dim() / 2);
    return reinterpret_cast<uint16_t*>(memory_.back().get());
  }
  TileOperands operands_;
  std::vector<Buffer> memory_;
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
  std::unique_ptr<TiledRows> tiled_queries, tiled_keys;

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
    if (k.pack_tiles != nullptr) return pack_tiles(k, panels ? TiledRows::kValues : 0);
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

 private:
  void pack_tiles(const ContrastKernels& k, int values) {
    tiled_queries = std::make_unique<TiledRows>(k, p.query, p.query_step, p.queries, p.dim,
                                                TiledRows::kPlain | values);
    tiled_keys = std::make_unique<TiledRows>(k, p.key, p.key_step, p.keys, p.dim,
                                             TiledRows::kColumns | values);
    p.tiled_queries = tiled_queries->operands(), p.tiled_keys = tiled_keys->operands();
  }
};

}  // namespace svitt
