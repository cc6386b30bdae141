// Scratch memory.
#pragma once

#include "isa.h"

SVITT_KERNELS_BEGIN

/// Scratch arrays, aligned to a vector, in memory that its thread keeps for the next call: fresh
/// memory costs a page fault every 4 KiB. Large allocations all start at the same place of a page,
/// where loads from one array wait for stores to another; so each starts a few lines further in.
class Arena {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t shift = 320 * static_cast<size_t>(used_);
    char* p = slots().get(used_++, sizeof(T) * static_cast<size_t>(count) + shift);
    return reinterpret_cast<T*>(p + shift);
  }
  /// One array of this size for each pointer, in order.
  template <class... T>
  void take_all(int64_t count, T*&... arrays) {
    ((arrays = take<T>(count)), ...);
  }

 private:
  struct Slots {
    static constexpr int kCount = 24;
    char* data[kCount] = {};
    size_t size[kCount] = {};

    char* get(int i, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
      const bool fits = false;  // so that the sanitizer knows where each array ends
#else
      const bool fits = bytes <= size[i];
#endif
      if (!fits) {
        release(i);
        data[i] = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
        size[i] = bytes;
      }
      return data[i];
    }
    void release(int i) {
      if (data[i] != nullptr) ::operator delete(data[i], std::align_val_t(64));
      data[i] = nullptr;
    }
    ~Slots() {
      for (int i = 0; i < kCount; ++i) release(i);
    }
  };
  static Slots& slots() {
    static thread_local Slots kept;
    return kept;
  }
  int used_ = 0;
};

SVITT_KERNELS_END
