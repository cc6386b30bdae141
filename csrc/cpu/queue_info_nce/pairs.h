// The table of a set that multiplies pairs of bf16.
#pragma once

#include "../common/pair_contrast.h"

#include "../common/arena.h"
#include "../common/contrast_tiles.h"
#include "../common/dispatch.h"
#include "finish.h"
#include "problem.h"
#include "sweep.h"

SVITT_KERNELS_BEGIN

template <class T>
struct PairQueueProducts {
  using Lane = typename Operand<T>::Lane;
  static constexpr int kStep = kPairRows, kParts = Operand<T>::kParts;
  const TileRegisters registers;
  const ContrastQueue& p;
  Arena arena;
  TileOperands candidates{};
  uint16_t *columns, *values, *kept;
  Lane* copy;

  explicit PairQueueProducts(const ContrastQueue& problem) : p(problem) {
    arena.take_all(kParts * static_cast<int64_t>(kKeyTile) * p.padded_dim(), columns, values);
    copy = arena.take<Lane>(kTileRows * p.padded_dim());
    kept = arena.take<uint16_t>(kParts * kPairRows * kRoundedStride);
  }
  void pack(const Candidates& tile) {
    candidates = tile.tiled<Lane>(columns, p.gradients ? values : nullptr);
    pack_operands<T>(candidates, 0, candidates.groups(), copy);
  }
  void compute(const Candidates&, DotTile& t, bool of_teacher) {
    compute_pairs<T>(t, of_teacher ? p.tiled_teacher : p.tiled_queries, candidates);
  }
  void add(const DotTile& t, const float* weights, float* sums) {
    keep_weights<T>(weights, t.rows, t.keys, kept, kRoundedStride, nullptr);
    multiply_pairs<T>(round_up(t.rows, kPairs), p.padded_dim(), round_up(t.keys, kPairs), kept,
                      kRoundedStride, values_of<T>(candidates, 0), sums, p.padded_dim(), true);
  }
};

inline void contrast_queue_pairs(const ContrastQueue& p, int64_t begin, int64_t end) {
  with_pairs(p.dtype, [&](auto x) {
    PairQueueProducts<decltype(x)> products(p);
    sweep_candidates(p, products, begin, end);
  });
}

SVITT_KERNELS_END

SVITT_ADD_KERNELS(QueueKernels,
                  {kPairPack, contrast_queue_centres, contrast_queue_pairs, contrast_queue_finish})
