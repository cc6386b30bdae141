// Pages of results: first touch of fresh memory costs more than writing it does.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace svitt {

/// Have the system back a large, fresh result by pages of 2 MiB where it can. Of a block from the
/// heap the place keeps the advice, as it does under torch's own THP_MEM_ALLOC_ENABLE.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20, kLarge = 4 << 20;
  if (static_cast<uintptr_t>(bytes) < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // else small pages
#endif
}

}  // namespace svitt
