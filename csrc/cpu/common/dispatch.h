// The kernels of an op by instruction set: each set's file adds a table, the op's entry takes one.
//
// A table is a struct of functions whose first, `takes`, says which problems it is for; null is for
// all, as the generic table has to be.
#pragma once

#include "isa.h"

namespace svitt {

#define SVITT_COUNT(...) +1
template <class Kernels>
inline const Kernels* kernels_of[SVITT_SETS(SVITT_COUNT)] = {};
#undef SVITT_COUNT

/// The best table for a problem that this processor can run.
template <class Kernels, class Problem>
const Kernels& choose(const Problem& problem) {
  for (int set = static_cast<int>(isa());; --set) {
    const Kernels* found = kernels_of<Kernels>[set];
    if (found != nullptr && (found->takes == nullptr || found->takes(problem))) return *found;
  }
}

}  // namespace svitt

/// Adds a table for the set in force. What runs when the library is loaded is outside of its target
/// region: any processor gets here.
#define SVITT_ADD_KERNELS(KERNELS, ...) \
  namespace svitt::SVITT_ISA { \
  constexpr KERNELS kTable = __VA_ARGS__; \
  [[maybe_unused]] static const auto kAdded = \
      kernels_of<KERNELS>[static_cast<int>(Isa::SVITT_ISA)] = &kTable; \
  }
