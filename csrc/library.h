// The stable library's macros, and the dispatcher's namespace that kernels register in: svitt_ops,
// or in a build for the kernel hub the extension's own name, since there every build has its own.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(CPU_KERNEL) || defined(CUDA_KERNEL)  // as kernel-builder defines them
#define SVITT_NAMESPACE TORCH_EXTENSION_NAME
#else
#define SVITT_NAMESPACE svitt_ops
#endif
