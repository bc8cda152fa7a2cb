// The threads of one call, and the barrier between their stages.
//
// The barrier is our own because OpenMP's spins for milliseconds: as soon as two threads of a team share a core, which
// one busy neighbour is enough for, each barrier costs a scheduler's slice, and a pass has hundreds. This one spins for
// 4000 pauses (50 to 200 microseconds, by CPU), about what an uneven stage takes, and then sleeps, so that the
// scheduler can run or move whoever is awaited. On a quiet machine both cost the same.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

namespace gunn {
namespace {

class Barrier {
 public:
  void wait(int size) {
    const uint32_t before = __atomic_load_n(&epoch_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&epoch_, before + 1, __ATOMIC_SEQ_CST);
      // Sequentially consistent with the sleeper's increment and its look at the epoch: one of us sees the other.
      if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST) > 0) wake();
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (__atomic_load_n(&epoch_, __ATOMIC_ACQUIRE) != before) return;
      pause();
    }
    __atomic_add_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&epoch_, __ATOMIC_SEQ_CST) == before) sleep(before);
    __atomic_sub_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
  }

 private:
  static constexpr int kSpins = 4000;

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }
#ifdef __linux__
  // Returns at once if the epoch has moved on.
  void sleep(uint32_t before) { syscall(SYS_futex, &epoch_, FUTEX_WAIT_PRIVATE, before, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &epoch_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void sleep(uint32_t) { sched_yield(); }
  void wake() {}
#endif

  alignas(64) int arrived_ = 0;
  alignas(64) uint32_t epoch_ = 0;
  int sleepers_ = 0;
};

// Where the share of thread `index` begins when `size` threads deal out `count` things in contiguous pieces.
constexpr int64_t share(int64_t count, int index, int size) { return count * index / size; }

struct Team {
  int index, size;
  Barrier* shared;

  void barrier() const {
    if (size > 1) shared->wait(size);
  }
  int64_t begin(int64_t count) const { return share(count, index, size); }
  int64_t end(int64_t count) const { return share(count, index + 1, size); }
};

}  // namespace
}  // namespace gunn
