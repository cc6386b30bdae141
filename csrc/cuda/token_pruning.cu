// Token pruning in CUDA, because Triton can neither keep a histogram's bins in shared memory nor
// let each warp walk its own share of a sample: there a selection takes 32 reductions over the
// whole program (16 for halves), here 4 passes (2). Not measured on a GPU yet, so that the public
// ops run the Triton kernels; these are the ops `<name>_cuda`.
//
// Selection, one block a sample. Scores become uint32 keys that order as they do, kept in shared
// memory up to kCached tokens, else read again from L2 in each pass. A radix select over digits of
// 8 bits, the highest first, narrows the keys to the threshold: a histogram of the next digit by
// integer atomics in shared memory, whose sum does not depend on their order (the hardware merges
// those of a warp that hit one bin, as all do where scores tie), and one warp that finds the digit.
// Then each warp counts what lies above and at the threshold in its share of the sample, and after
// one barrier emits indices, inverse map and position codes in order: ties go to the lower index by
// themselves.
//
// Rows are gathered by groups of lanes, a row a group, in vectors of 16 bytes where addresses
// allow; four vectors a lane are on their way at a time. From kFusedBatch samples on, when there is
// one for every multiprocessor, the block that selected also copies; for fewer a second launch
// does. The backward is the same gather through the inverse map, whose -1 are zeros: every element
// of a result is written once.
//
// Memory traffic: a survivor's row read and written once; backward the gradient written once.
// Numerics: bits are compared and copied.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "../library.h"

namespace svitt {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 32;  // of a selecting block: one lane of a warp for each
constexpr int kSelectThreads = kWarps * kWarp;
constexpr int kGatherThreads = 256;
constexpr int kDigits = 256;
constexpr int kCached = 8192;  // keys in shared memory: 32 KiB, as any launch may have
constexpr int kVectors = 4;    // on their way at a time in each lane
constexpr int64_t kFusedBatch = 128;
constexpr unsigned kAll = 0xffffffff;

struct Selection {
  const void* scores;
  int64_t score_batch;  // in elements
  uint32_t infinity;    // its bits, in the upper end of 32
  int num_tokens, keep;
  int64_t* indices;      // (batch, keep)
  int32_t* inverse;      // (batch, num_tokens), or null
  const int32_t* codes;  // (1 or batch, num_tokens), or null
  int64_t codes_batch;   // 0 broadcasts
  int32_t* kept_codes;   // (batch, keep)
};

struct Gather {  // strides and sizes in bytes
  const char* from;
  int64_t from_batch, from_row;
  char* to;  // (batch, num_global + count, row_bytes), contiguous; null: nothing to copy
  int64_t row_bytes;
  int num_global, count;

  __host__ __device__ int rows() const { return num_global + count; }
};

/// The keys of one sample; Bits is uint32_t or, for halves, uint16_t.
template <class Bits>
struct Keys {
  const Bits* scores;
  uint32_t* cache;  // null: too many to keep
  uint32_t infinity;

  /// Orders as the score does: 0 and -0 are equal, NaN is less than all.
  __device__ uint32_t compute(int i) const {
    constexpr int kShift = 32 - 8 * sizeof(Bits);
    uint32_t bits = static_cast<uint32_t>(scores[i]) << kShift;
    if (bits << 1 == 0) bits = 0;
    if ((bits & 0x7fffffff) > infinity) return 0;
    const uint32_t flipped = bits >> 31 ? ~bits : bits | 0x80000000;
    return flipped >> kShift << kShift;
  }
  __device__ uint32_t operator[](int i) const { return cache == nullptr ? compute(i) : cache[i]; }
};

struct SelectShared {
  uint32_t histogram[kDigits];
  uint32_t digit, wanted;
  uint32_t above[kWarps], ties[kWarps];
};

/// By one warp: the digit that the `wanted` largest keys reach, and how many of it they take.
__device__ void find_digit(SelectShared& shared, uint32_t wanted, int lane) {
  constexpr int kBins = kDigits / kWarp;
  const int top = kDigits - 1 - lane * kBins;  // lane 0 has the largest digits
  uint32_t own = 0;
  for (int i = 0; i < kBins; ++i) own += shared.histogram[top - i];
  uint32_t through = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, through, step);
    if (lane >= step) through += other;
  }
  uint32_t before = through - own;
  if (before < wanted && wanted <= through) {
    int digit = top;
    while (before + shared.histogram[digit] < wanted) before += shared.histogram[digit--];
    shared.digit = digit;
    shared.wanted = wanted - before;
  }
}

/// The key of the `keep`-th largest score; `ties` is how many of the keys equal to it are kept.
template <class Bits>
__device__ uint32_t find_threshold(const Keys<Bits>& keys, int num_tokens, uint32_t keep,
                                   SelectShared& shared, uint32_t& ties) {
  const int thread = threadIdx.x;
  uint32_t prefix = 0, wanted = keep;
#pragma unroll
  for (int shift = 24; shift >= 32 - 8 * static_cast<int>(sizeof(Bits)); shift -= 8) {
    if (thread < kDigits) shared.histogram[thread] = 0;
    __syncthreads();
    for (int i = thread; i < num_tokens; i += kSelectThreads) {
      const uint32_t key = keys[i];
      const bool candidate = shift == 24 || (key ^ prefix) >> (shift + 8) == 0;
      if (candidate) atomicAdd(&shared.histogram[key >> shift & (kDigits - 1)], 1u);
    }
    __syncthreads();
    if (thread < kWarp) find_digit(shared, wanted, thread);
    __syncthreads();
    prefix |= shared.digit << shift;
    wanted = shared.wanted;
  }
  ties = wanted;
  return prefix;
}

template <class Bits>
__device__ void select_sample(const Selection& p, int64_t sample, uint32_t* cache,
                              SelectShared& shared) {
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, n = p.num_tokens;
  const auto* scores = static_cast<const Bits*>(p.scores) + sample * p.score_batch;
  const Keys<Bits> keys{scores, n <= kCached ? cache : nullptr, p.infinity};
  if (keys.cache != nullptr)
    for (int i = thread; i < n; i += kSelectThreads) cache[i] = keys.compute(i);
  // The first barrier of find_threshold stands between this and who reads it.
  uint32_t wanted = 0;
  const uint32_t least = find_threshold(keys, n, p.keep, shared, wanted);

  const int share = ((n + kSelectThreads - 1) / kSelectThreads) * kWarp;
  const int begin = min(n, warp * share), end = min(n, begin + share);
  uint32_t above = 0, ties = 0;
  for (int start = begin; start < end; start += kWarp) {
    const int i = start + lane;
    const uint32_t key = i < end ? keys[i] : 0;
    above += __popc(__ballot_sync(kAll, i < end && key > least));
    ties += __popc(__ballot_sync(kAll, i < end && key == least));
  }
  if (lane == 0) {
    shared.above[warp] = above;
    shared.ties[warp] = ties;
  }
  __syncthreads();
  above = __reduce_add_sync(kAll, lane < warp ? shared.above[lane] : 0u);
  ties = __reduce_add_sync(kAll, lane < warp ? shared.ties[lane] : 0u);

  int64_t* indices = p.indices + sample * p.keep;
  int32_t* inverse = p.inverse == nullptr ? nullptr : p.inverse + sample * n;
  const int32_t* codes = p.codes == nullptr ? nullptr : p.codes + sample * p.codes_batch;
  const uint32_t lower = (1u << lane) - 1;
  for (int start = begin; start < end; start += kWarp) {
    const int i = start + lane;
    const uint32_t key = i < end ? keys[i] : 0;
    const uint32_t above_mask = __ballot_sync(kAll, i < end && key > least);
    const uint32_t tie_mask = __ballot_sync(kAll, i < end && key == least);
    const uint32_t ties_before = ties + __popc(tie_mask & lower);
    const uint32_t slot = above + __popc(above_mask & lower) + min(ties_before, wanted);
    const bool kept = key > least || (key == least && ties_before < wanted);
    if (i < end) {
      if (inverse != nullptr) inverse[i] = kept ? static_cast<int32_t>(slot) : -1;
      if (kept) {
        indices[slot] = i;
        if (codes != nullptr) p.kept_codes[sample * p.keep + slot] = codes[i];
      }
    }
    above += __popc(above_mask);
    ties += __popc(tie_mask);
  }
}

/// Copy a row, or write zeros where there is none to copy.
template <class V>
__device__ void copy_row(const V* __restrict__ from, V* __restrict__ to, int vectors, int lane,
                         int lanes) {
  for (int start = lane; start < vectors; start += kVectors * lanes) {
    V x[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int v = start + k * lanes;
      x[k] = from != nullptr && v < vectors ? from[v] : V{};
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if (start + k * lanes < vectors) to[start + k * lanes] = x[k];
  }
}

/// One row of a sample: a global token as it is, else the row that the map names.
template <class V, class Index>
__device__ void gather_row(const Gather& p, const Index* map, int64_t sample, int row, int lane,
                           int lanes) {
  int64_t source = row;
  if (row >= p.num_global) {
    source = map[sample * p.count + row - p.num_global];
    if (source >= 0) source += p.num_global;
  }
  const char* from = source < 0 ? nullptr : p.from + sample * p.from_batch + source * p.from_row;
  char* to = p.to + (sample * p.rows() + row) * p.row_bytes;
  copy_row(reinterpret_cast<const V*>(from), reinterpret_cast<V*>(to),
           static_cast<int>(p.row_bytes / sizeof(V)), lane, lanes);
}

/// Select for one sample; where there are rows to copy, in vectors of 16 bytes, copy them too.
template <class Bits>
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(Selection p, Gather copy, int lanes) {
  extern __shared__ uint32_t cache[];
  __shared__ SelectShared shared;
  const int64_t sample = blockIdx.x;
  select_sample<Bits>(p, sample, cache, shared);
  if (copy.to == nullptr) return;
  __syncthreads();  // other threads read the indices that this one wrote
  const int lane = threadIdx.x % lanes, groups = kSelectThreads / lanes;
  for (int row = threadIdx.x / lanes; row < copy.rows(); row += groups)
    gather_row<uint4>(copy, p.indices, sample, row, lane, lanes);
}

/// A block gathers kGatherThreads / lanes rows of one sample.
template <class V, class Index>
__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(Gather p, const Index* map, unsigned tiles, int lanes) {
  const int64_t sample = blockIdx.x / tiles;
  const int row = blockIdx.x % tiles * (kGatherThreads / lanes) + threadIdx.x / lanes;
  if (row < p.rows()) gather_row<V>(p, map, sample, row, threadIdx.x % lanes, lanes);
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using OptionalTensor = std::optional<Tensor>;

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

/// Bytes of the widest vector that every row of a gather is made of.
int64_t vector_bytes(const Gather& p) {
  const auto bits = reinterpret_cast<uintptr_t>(p.from) | reinterpret_cast<uintptr_t>(p.to) |
                    static_cast<uintptr_t>(p.from_batch | p.from_row | p.row_bytes);
  return static_cast<int64_t>(std::min<uintptr_t>(16, bits & (~bits + 1)));
}

/// Lanes that share a row: a warp, or as many as the row has vectors.
int lanes_of(const Gather& p, int64_t vector) {
  const auto vectors = static_cast<uint64_t>(p.row_bytes / vector);
  return static_cast<int>(std::min<uint64_t>(kWarp, std::bit_ceil(vectors)));
}

Gather gather_of(const Tensor& from, Tensor& to, int64_t num_global) {
  const auto bytes = static_cast<int64_t>(from.element_size());
  return {static_cast<const char*>(from.const_data_ptr()),
          from.stride(0) * bytes,
          from.stride(1) * bytes,
          static_cast<char*>(to.mutable_data_ptr()),
          from.size(2) * bytes,
          static_cast<int>(num_global),
          static_cast<int>(to.size(1) - num_global)};
}

template <class V, class Index>
void launch_gather(const Gather& p, const Index* map, int64_t batch, cudaStream_t stream) {
  const int lanes = lanes_of(p, sizeof(V)), rows = kGatherThreads / lanes;
  const auto tiles = static_cast<unsigned>((p.rows() + rows - 1) / rows);
  STD_TORCH_CHECK(batch * tiles <= std::numeric_limits<int>::max(), "too many tokens to gather");
  gather_kernel<V, Index>
      <<<static_cast<unsigned>(batch * tiles), kGatherThreads, 0, stream>>>(p, map, tiles, lanes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Index>
void gather(const Gather& p, const Index* map, int64_t batch, cudaStream_t stream) {
  if (batch * p.rows() * p.row_bytes == 0) return;
  switch (vector_bytes(p)) {
    case 16: return launch_gather<uint4>(p, map, batch, stream);
    case 8: return launch_gather<uint2>(p, map, batch, stream);
    case 4: return launch_gather<uint32_t>(p, map, batch, stream);
    default: return launch_gather<uint16_t>(p, map, batch, stream);
  }
}

Selection selection_of(const Tensor& scores, int64_t keep, Tensor& indices) {
  STD_TORCH_CHECK(scores.size(1) <= std::numeric_limits<int>::max(), "too many tokens to select");
  Selection p{};
  p.scores = scores.const_data_ptr();
  p.score_batch = scores.stride(0);
  p.infinity = scores.scalar_type() == ScalarType::Half ? 0x7c000000 : 0x7f800000;
  p.num_tokens = static_cast<int>(scores.size(1)), p.keep = static_cast<int>(keep);
  p.indices = indices.mutable_data_ptr<int64_t>();
  return p;
}

/// One block a sample; `copy` is copied in the same launch unless its `to` is null.
void select(const Tensor& scores, const Selection& p, const Gather& copy, cudaStream_t stream) {
  const int64_t batch = scores.size(0);
  if (batch == 0 || p.keep == 0) return;
  const size_t shared = p.num_tokens <= kCached ? p.num_tokens * sizeof(uint32_t) : 0;
  const auto blocks = static_cast<unsigned>(batch);
  const int lanes = copy.to == nullptr ? 1 : lanes_of(copy, sizeof(uint4));
  if (scores.scalar_type() == ScalarType::Float)
    select_kernel<uint32_t><<<blocks, kSelectThreads, shared, stream>>>(p, copy, lanes);
  else
    select_kernel<uint16_t><<<blocks, kSelectThreads, shared, stream>>>(p, copy, lanes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor select_op(Tensor scores, int64_t keep) {
  const DeviceGuard guard(scores.get_device_index());
  Tensor indices = torch::stable::new_empty(scores, {scores.size(0), keep}, ScalarType::Long);
  select(scores, selection_of(scores, keep, indices), Gather{}, stream_of(scores));
  return indices;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_op(Tensor tokens, Tensor scores, int64_t keep,
                                                    int64_t num_global, OptionalTensor codes) {
  const DeviceGuard guard(tokens.get_device_index());
  const int64_t batch = scores.size(0), num_tokens = scores.size(1);
  Tensor out = torch::stable::new_empty(tokens, {batch, num_global + keep, tokens.size(2)});
  Tensor indices = torch::stable::new_empty(scores, {batch, keep}, ScalarType::Long);
  Tensor inverse = torch::stable::new_empty(scores, {batch, num_tokens}, ScalarType::Int);
  Tensor kept_codes = torch::stable::new_empty(inverse, {0});
  Selection p = selection_of(scores, keep, indices);
  p.inverse = inverse.mutable_data_ptr<int32_t>();
  if (codes.has_value()) {
    kept_codes = torch::stable::new_empty(inverse, {batch, keep});
    p.codes = codes->const_data_ptr<int32_t>();
    p.codes_batch = codes->size(0) > 1 ? num_tokens : 0;
    p.kept_codes = kept_codes.mutable_data_ptr<int32_t>();
  }
  const Gather copy = gather_of(tokens, out, num_global);
  const bool fused =
      batch >= kFusedBatch && p.keep > 0 && copy.row_bytes > 0 && vector_bytes(copy) == 16;
  const cudaStream_t stream = stream_of(tokens);
  select(scores, p, fused ? copy : Gather{}, stream);
  if (!fused) gather(copy, p.indices, batch, stream);
  return {out, indices, inverse, kept_codes};
}

Tensor backward_op(Tensor grad_out, Tensor inverse, int64_t num_global) {
  const DeviceGuard guard(grad_out.get_device_index());
  const int64_t batch = inverse.size(0), rows = num_global + inverse.size(1);
  Tensor grad = torch::stable::new_empty(grad_out, {batch, rows, grad_out.size(2)});
  gather(gather_of(grad_out, grad, num_global), inverse.const_data_ptr<int32_t>(), batch,
         stream_of(grad_out));
  return grad;
}

}  // namespace
}  // namespace svitt

STABLE_TORCH_LIBRARY_IMPL(SVITT_NAMESPACE, CUDA, m) {
  m.impl("select_tokens_cuda", TORCH_BOX(&svitt::select_op));
  m.impl("prune_tokens_cuda", TORCH_BOX(&svitt::prune_op));
  m.impl("prune_tokens_backward_cuda", TORCH_BOX(&svitt::backward_op));
}
