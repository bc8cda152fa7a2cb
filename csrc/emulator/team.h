// The blocks that run at the same time, on one OS thread: one block of an ordinary launch, the blocks of a cluster, or
// all blocks of a cooperative launch.
//
// Threads that can go on stand in a queue. The running one, when it has to wait, switches straight to the next; only
// when there is none does the OS thread's own context get its turn, to end the team or to report who waits where. Since
// one OS thread runs the whole team, a seed fixes the schedule completely, and "all wait" is a fact and not a guess by
// the clock. One block may be slow: it goes on only while all others wait.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/memory.h"
#include "emulator/primitives.h"
#include "emulator/queue.h"
#include "emulator/warp.h"

namespace gunn::emulator {

struct Block;
class Team;

// Waiting threads form a list through themselves.
struct Barrier {
  unsigned expected = 0, arrived = 0, yes = 0;
  unsigned phase = 0;
  Site site;  // where the threads came from: all from the same line, or the barrier is divergent
  Thread *first = nullptr, *last = nullptr;
  Votes votes{};        // of the phase that ended last
  char tokens[2] = {};  // by turns, or a late thread would acquire the next phase's releases
};

struct Cluster {
  Barrier barrier;
  Block* blocks = nullptr;
  unsigned size = 0;
  bool met = false;  // its blocks have passed a barrier, so all of them run
};

struct Block {
  uint3 index{};
  Cluster* cluster = nullptr;
  unsigned rank = 0;  // in the cluster
  Barrier barrier;    // expects the threads that have not ended
  std::vector<Warp> warps;
  SharedMemory shared;
};

struct Thread : Coordinates {
  Team* team = nullptr;
  Block* home = nullptr;
  unsigned number = 0, lane = 0;  // in the block, x fastest; in the warp
  Fiber* fiber = nullptr;
  Thread* next = nullptr;          // in a barrier's list
  const char* waits_at = nullptr;  // null: it can go on
  Site site;                       // where it waits
  bool polls = false, ended = false, slow = false;
  Copies copies;

  Warp& warp() const { return home->warps[number / 32]; }
};

// What the teams of a launch have in common.
struct Job {
  const Configuration& configuration;
  void (*body)(void*);
  void* arguments;
  std::optional<uint64_t> seed, slow;
  unsigned teams;
  size_t stack_bytes, most_shared;
  char* started;  // tokens: what precedes the launch comes before its threads,
  char* ended;    // and they before what follows it
};

class Team {
 public:
  // Runs the blocks of one cluster, or all. Throws Error when the kernel does something wrong; the team is spent then.
  void run(const Job& job, unsigned team);

  // For the running thread.
  Votes wait_at(Barrier& barrier, const char* name, bool vote, Site site);
  Slot meet(unsigned mask, const char* name, const Contribution& contribution, Site site);
  void poll_again(const char* what, Site site);
  void poll_done() { turns_of(*running_).failed_polls = 0; }
  void interleave();
  [[noreturn]] void report(const std::string& text) { report(*running_, text); }
  [[noreturn]] void report(const Thread& culprit, const std::string& text);

  const Job& job() const { return *job_; }
  Barrier& grid() { return grid_; }

 private:
  void set_up(unsigned team);
  void place(Block& block, unsigned cluster, Thread* threads);
  std::string deadlock() const;

  // Who could go on.
  struct Turns {
    Queue ready, polling;
    size_t failed_polls = 0;  // in a row, while nothing else happened
  };
  Turns& turns_of(const Thread& thread) { return thread.slow ? slow_ : quick_; }

  Thread* choose();
  Thread* choose(Turns& turns);
  void suspend(const char* waits_at, Site site);
  void resume(Thread& thread, Fiber& from);
  void become(Thread& thread);
  void let_go(Thread& thread);
  void open(Barrier& barrier);
  void finish(Meeting& meeting);
  void end(Thread& thread);
  void leave(Barrier& barrier);

  void make_fibers(size_t count);
  Fiber& idle_fiber();
  void put_away(Fiber& fiber);
  void live();

  const Job* job_ = nullptr;
  std::vector<Thread> threads_;
  std::unique_ptr<Block[]> blocks_;
  std::unique_ptr<Cluster[]> clusters_;
  Barrier grid_;

  Fiber main_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber *idle_first_ = nullptr, *idle_last_ = nullptr;

  Thread* running_ = nullptr;
  unsigned unfinished_ = 0;
  Turns quick_, slow_;
  bool stored_ = false;     // perhaps a word, since somebody was chosen
  bool slow_went_ = false;  // since the quick looked
  std::mt19937_64 random_;
  std::string error_;
};

}  // namespace gunn::emulator
