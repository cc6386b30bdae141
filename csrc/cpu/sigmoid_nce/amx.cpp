// The sigmoid loss for AMX.
#if defined(__x86_64__)
#define SVITT_ISA amx

#include "../common/amx_gradient.h"
#include "../common/dispatch.h"
#include "problem.h"
#include "weigh.h"

SVITT_KERNELS_BEGIN

static void contrast_sigmoid_amx(const ContrastSigmoid& p, int64_t chunk, int64_t begin,
                                 int64_t end) {
  weigh_tiles<TiledGradientProducts, SigmoidWeights>(p, chunk, begin, end);
}

SVITT_KERNELS_END

SVITT_ADD_KERNELS(SigmoidKernels, {kTiledGradient, contrast_sigmoid_amx})
#endif
