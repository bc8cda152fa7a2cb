// The sanitizers' own functions, if the program was linked with one: null otherwise.
#pragma once

#include <cstddef>

extern "C" {
#define GUNN_IF_LINKED __attribute__((weak))
GUNN_IF_LINKED void* __tsan_create_fiber(unsigned flags);
GUNN_IF_LINKED void __tsan_destroy_fiber(void* fiber);
GUNN_IF_LINKED void* __tsan_get_current_fiber();
GUNN_IF_LINKED void __tsan_switch_to_fiber(void* fiber, unsigned flags);
GUNN_IF_LINKED void __tsan_acquire(void* token);
GUNN_IF_LINKED void __tsan_release(void* token);
GUNN_IF_LINKED void AnnotateIgnoreWritesBegin(const char* file, int line);
GUNN_IF_LINKED void AnnotateIgnoreWritesEnd(const char* file, int line);
GUNN_IF_LINKED void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
GUNN_IF_LINKED void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack, size_t* bytes);
GUNN_IF_LINKED void __asan_unpoison_memory_region(const void* begin, size_t bytes);
#undef GUNN_IF_LINKED
}

namespace gunn::emulator {

inline bool races_are_watched() { return __tsan_create_fiber != nullptr; }

// What came before a release of a token came before what follows an acquire of it.
inline void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}
inline void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}

// The emulator's own memory accesses, malloc and free included: the race detector looks away.
class Unwatched {
 public:
  Unwatched() {
    if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

}  // namespace gunn::emulator
