// InfoNCE for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx

#include "../common/amx_gradient.h"
#include "../common/dispatch.h"
#include "backward.h"
#include "forward.h"
#include "problem.h"

SVITT_KERNELS_BEGIN

static void contrast_forward_amx(const ContrastForward& p, int64_t chunk, int64_t begin,
                                 int64_t end) {
  const TileRegisters registers;
  forward_tiles<kAmxRows>(p, chunk, begin, end,
                          [&](DotTile& t) { compute_amx(t, p.tiled_queries, p.tiled_keys); });
}

static void contrast_backward_amx(const ContrastBackward& p, int64_t chunk, int64_t begin,
                                  int64_t end) {
  weigh_tiles<TiledGradientProducts, SoftmaxWeights>(p, chunk, begin, end);
}

SVITT_KERNELS_END

SVITT_ADD_KERNELS(InfoNceKernels, {kTiledGradient, contrast_forward_amx, contrast_backward_amx})
#endif
