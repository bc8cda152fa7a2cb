// A fiber: a stack and a place on it, switched to by hand. Each runs CUDA threads, one after another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(GUNN_EMULATOR_UCONTEXT)
#define GUNN_EMULATOR_UCONTEXT  // slower (two system calls a switch), on any POSIX machine
#endif
#ifdef GUNN_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace gunn::emulator {

class Fiber {
 public:
  Fiber() = default;  // the context it is first switched from: an OS thread's own stack
  Fiber(size_t stack_bytes, unsigned number, void (*entry)(void*), void* argument);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void switch_to(Fiber& to);
  void adopt_thread();  // for the first kind: says to the race detector which thread it is
  void release_as(
      void* token);  // what ran on this fiber, which will not run again, comes before an acquire of the token

  Fiber* next_idle = nullptr;

 private:
  static void start(Fiber* fiber);
  void landed();

#ifdef GUNN_EMULATOR_UCONTEXT
  ucontext_t context_{};
#else
  void* stack_pointer_ = nullptr;
#endif
  bool owns_stack_ = false;
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  Fiber* came_from_ = nullptr;
  void* race_context_ = nullptr;  // ThreadSanitizer's view of this fiber
  void* fake_stack_ = nullptr;    // AddressSanitizer's
};

}  // namespace gunn::emulator
