// Lets Python import the extension, which loads it. Kernels register themselves (csrc/library.h),
// schemas are registered in Python; kernel-builder generates the header.

#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
