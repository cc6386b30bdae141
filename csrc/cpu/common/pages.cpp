// Results stay in the heap between calls.
//
// glibc maps large blocks alone and gives freed memory at the top of the heap back, 128 KiB at
// first, 64 MiB at most as it adapts. The gradients of keys and values, 19 MB each, and those of
// the call before pass that: one call in ten gave them back and touched them anew, 9,400 pages of
// 4 KiB. With these thresholds blocks up to 32 MiB, glibc's limit, come from the heap, and up to
// 256 MiB of it stay with the process; after a few calls none is touched anew. Whoever sets glibc's
// own variables has those. Larger results are mapped anew each time.

#include <cstdlib>
#include <cstring>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

[[maybe_unused]] const bool kKept = [] {
#if defined(__GLIBC__)
  const char* tunables = std::getenv("GLIBC_TUNABLES");
  const bool chosen = std::getenv("MALLOC_TRIM_THRESHOLD_") ||
                      std::getenv("MALLOC_MMAP_THRESHOLD_") ||
                      (tunables && std::strstr(tunables, "glibc.malloc."));
  return !chosen && mallopt(M_MMAP_THRESHOLD, 32 << 20) && mallopt(M_TRIM_THRESHOLD, 256 << 20);
#else
  return false;
#endif
}();

}  // namespace
