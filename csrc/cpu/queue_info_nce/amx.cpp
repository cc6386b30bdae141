// InfoNCE against a batch and a queue for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx

#include "../common/amx_contrast.h"
#include "../common/arena.h"
#include "../common/contrast_tiles.h"
#include "../common/dispatch.h"
#include "finish.h"
#include "problem.h"
#include "sweep.h"

SVITT_KERNELS_BEGIN

struct TiledQueueProducts {
  static constexpr int kStep = kAmxRows;
  const ContrastQueue& p;
  Arena arena;
  TileOperands candidates{};
  uint16_t *columns, *values, *copy, *rounded;

  explicit TiledQueueProducts(const ContrastQueue& problem) : p(problem) {
    arena.take_all(static_cast<int64_t>(kKeyTile) * p.padded_dim(), columns, values);
    copy = arena.take<uint16_t>(kTileRows * p.padded_dim());
    rounded = arena.take<uint16_t>(kAmxRows * kRoundedStride);
  }
  void pack(const Candidates& tile) {
    candidates = tile.tiled(columns, p.gradients ? values : nullptr);
    pack_operands(candidates, 0, candidates.groups(), copy);
  }
  void compute(const Candidates&, DotTile& t, bool of_teacher) {
    compute_amx(t, of_teacher ? p.tiled_teacher : p.tiled_queries, candidates);
  }
  void add(const DotTile& t, const float* weights, float* sums) {
    round_weights(weights, t.rows, t.keys, rounded, kRoundedStride, nullptr);
    multiply_amx(round_up(t.rows, kPairs), p.padded_dim(), round_up(t.keys, kPairs), rounded,
                 kRoundedStride, values_of(candidates, 0), sums, p.padded_dim(), true);
  }
};

static void contrast_queue_amx(const ContrastQueue& p, int64_t begin, int64_t end) {
  const TileRegisters registers;
  TiledQueueProducts products(p);
  sweep_candidates(p, products, begin, end);
}

SVITT_KERNELS_END

SVITT_ADD_KERNELS(QueueKernels,
                  {kTilePack, contrast_queue_centres, contrast_queue_amx, contrast_queue_finish})
#endif
