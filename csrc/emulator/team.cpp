#include "emulator/team.h"

#include <sstream>

#include "core/error.h"
#include "emulator/report.h"
#include "emulator/sanitizers.h"

namespace gunn::emulator {

__thread const Coordinates* self = nullptr;

namespace {

unsigned volume(dim3 d) { return d.x * d.y * d.z; }

uint3 place_in(dim3 d, unsigned number) { return {number % d.x, number / d.x % d.y, number / (d.x * d.y)}; }

dim3 clusters_of(const Configuration& c) {
  return dim3(c.grid.x / c.cluster.x, c.grid.y / c.cluster.y, c.grid.z / c.cluster.z);
}

}  // namespace

// ---- The life of a team

void Team::run(const Job& job, unsigned team) {
  job_ = &job;
  set_up(team);
  if (Thread* first = choose()) resume(*first, main_);
  // Back here: all have ended, or nobody can go on, or something is wrong.
  self = nullptr;
  if (unfinished_ > 0) {
    for (Thread& thread : threads_) {
      if (thread.fiber && !thread.ended) thread.fiber->release_as(job.ended);
    }
    acquire(job.ended);
    if (error_.empty()) error_ = deadlock();
  }
  const Unwatched unwatched;
  blocks_.reset();
  clusters_.reset();
  if (!error_.empty()) fail(error_);
}

std::string Team::deadlock() const {
  return "deadlock: every thread waits, and nobody is left who could let one go on." + describe_waiting(threads_) +
         "\nAll threads that a barrier expects must come to it, and a polled value needs somebody to store it." +
         (job_->configuration.cooperative ? "" : " Blocks wait for each other only in a cooperative launch.");
}

void Team::set_up(unsigned team) {
  const Unwatched unwatched;
  const Configuration& c = job_->configuration;
  const dim3 clusters = clusters_of(c);
  const unsigned cluster_count = c.cooperative ? volume(clusters) : 1;
  const unsigned cluster_size = volume(c.cluster), block_size = volume(c.block);
  unfinished_ = cluster_count * cluster_size * block_size;

  // New blocks each time, so that to the race detector their barriers have nothing to do with earlier ones.
  blocks_ = std::make_unique<Block[]>(cluster_count * cluster_size);
  clusters_ = std::make_unique<Cluster[]>(cluster_count);
  grid_ = Barrier{};
  grid_.expected = unfinished_;
  threads_.resize(unfinished_);
  for (Turns* turns : {&quick_, &slow_}) {
    turns->ready.reset(unfinished_);
    turns->polling.reset(unfinished_);
    turns->failed_polls = 0;
  }
  stored_ = slow_went_ = false;
  if (job_->seed) random_.seed(*job_->seed * 1000003 + team);

  main_.adopt_thread();
  // The race detector takes all that runs on a fiber to be in order: neighbouring blocks share none. They are made
  // here, as one made by a CUDA thread would come after what that thread did.
  if (races_are_watched()) make_fibers(job_->teams > 1 ? 2 * unfinished_ : unfinished_);

  for (unsigned i = 0; i < cluster_count; ++i) {
    const uint3 corner = place_in(clusters, c.cooperative ? i : team);
    Cluster& cluster = clusters_[i];
    cluster.blocks = &blocks_[i * cluster_size];
    cluster.size = cluster_size;
    cluster.barrier.expected = cluster_size * block_size;
    for (unsigned rank = 0; rank < cluster_size; ++rank) {
      Block& block = cluster.blocks[rank];
      const uint3 within = place_in(c.cluster, rank);
      block.index = {corner.x * c.cluster.x + within.x, corner.y * c.cluster.y + within.y,
                     corner.z * c.cluster.z + within.z};
      block.cluster = &cluster;
      block.rank = rank;
      place(block, block_size, &threads_[(i * cluster_size + rank) * block_size]);
    }
  }
}

void Team::place(Block& block, unsigned size, Thread* threads) {
  const Configuration& c = job_->configuration;
  block.barrier.expected = size;
  block.warps.resize((size + 31) / 32);
  block.shared.make_dynamic(c.shared);
  for (unsigned number = 0; number < size; ++number) {
    Thread& thread = threads[number];
    thread.thread = place_in(c.block, number);
    thread.block_size = c.block;
    thread.grid_size = c.grid;
    thread.team = this;
    thread.block = block.index;
    thread.home = &block;
    thread.number = number;
    thread.lane = number % 32;
    thread.fiber = nullptr;
    thread.waits_at = nullptr;
    thread.polls = thread.ended = false;
    thread.copies.clear();
    thread.slow = c.cooperative && job_->slow == static_cast<uint64_t>(&block - blocks_.get());
    thread.warp().add(thread.lane);
    let_go(thread);
  }
}

// ---- Who goes on

// Null when nobody can: none is ready, and every polling thread has looked again since something happened last. The
// quick look again at each word that the slow ones store, not at each step of theirs: that would take the most time.
Thread* Team::choose() {
  if (stored_) stored_ = false, quick_.failed_polls = slow_.failed_polls = 0;
  if (Thread* quick = choose(quick_)) return quick;
  if (Thread* slow = choose(slow_)) return slow;
  if (!slow_went_) return nullptr;
  slow_went_ = false, quick_.failed_polls = 0;
  return choose(quick_);
}
Thread* Team::choose(Turns& turns) {
  auto& [ready, polling, failed_polls] = turns;
  const bool look_early = job_->seed && failed_polls < polling.size() && random_() % 8 == 0;
  if (!ready.empty() && !look_early) {
    failed_polls = slow_.failed_polls = 0;
    slow_went_ |= &turns == &slow_;
    return job_->seed ? ready.pop_any(random_) : ready.pop();
  }
  if (!polling.empty() && failed_polls <= 2 * polling.size()) return polling.pop();
  return nullptr;
}

void Team::suspend(const char* waits_at, Site site) {
  Thread& me = *running_;
  me.waits_at = waits_at;
  me.site = site;
  if (Thread* next = choose()) {
    resume(*next, *me.fiber);
  } else {
    me.fiber->switch_to(main_);
  }
}

void Team::resume(Thread& thread, Fiber& from) {
  if (!thread.fiber) thread.fiber = &idle_fiber();
  become(thread);
  if (thread.fiber != &from) from.switch_to(*thread.fiber);
}

// Never inlined: a fiber outlives launches and may find itself on another OS thread, where `self` has another address.
__attribute__((noinline)) void Team::become(Thread& thread) {
  thread.waits_at = nullptr;
  thread.polls = false;
  running_ = &thread;
  self = &thread;
}

void Team::let_go(Thread& thread) { turns_of(thread).ready.push(&thread); }

void Team::interleave() {
  if (job_->seed && random_() % 4 == 0) {
    let_go(*running_);
    suspend("an atomic", Site{});
  }
  stored_ = true;
}

void Team::poll_again(const char* what, Site site) {
  Turns& turns = turns_of(*running_);
  ++turns.failed_polls;
  running_->polls = true;
  turns.polling.push(running_);
  suspend(what, site);
}

// Caught where the culprit's fiber began.
void Team::report(const Thread& culprit, const std::string& text) { fail(name_of(culprit), ": ", text); }

// ---- Barriers and warps

Votes Team::wait_at(Barrier& barrier, const char* name, bool vote, Site site) {
  if (barrier.arrived > 0 && barrier.site != site) {
    std::ostringstream text;
    text << "divergent barriers: it comes to " << name << " at " << name_of(site) << ", but " << name_of(*barrier.first)
         << " and perhaps others wait for it at " << name_of(barrier.site)
         << ". All must come to the same one: move it out of the branch.";
    report(text.str());
  }
  Thread& me = *running_;
  char* const token = &barrier.tokens[barrier.phase % 2];
  release(token);
  barrier.site = site;
  barrier.yes += vote;
  if (++barrier.arrived < barrier.expected) {
    me.next = nullptr;
    (barrier.first ? barrier.last->next : barrier.first) = &me;
    barrier.last = &me;
    suspend(name, site);
  } else {
    open(barrier);
    if (job_->seed) {  // the last to come is not always the first to go
      let_go(me);
      suspend(name, site);
    }
  }
  acquire(token);
  return barrier.votes;
}

void Team::open(Barrier& barrier) {
  barrier.votes = {barrier.yes, barrier.arrived};
  barrier.yes = barrier.arrived = 0;
  ++barrier.phase;
  for (Thread* thread = barrier.first; thread;) {
    Thread* const next = thread->next;  // before it goes on and waits elsewhere
    let_go(*thread);
    thread = next;
  }
  barrier.first = barrier.last = nullptr;
}

Slot Team::meet(unsigned mask, const char* name, const Contribution& contribution, Site site) {
  Thread& me = *running_;
  const auto here = [&] { return std::string(name) + " (" + name_of(site) + ")"; };
  if (!(mask >> me.lane & 1)) {
    report(here() + " is called with mask " + name_of_mask(mask) + ", which leaves out its own lane " +
           std::to_string(me.lane) + ". Every calling lane belongs in the mask.");
  }
  Meeting& meeting = me.warp().at(mask);
  if (meeting.arrived && meeting.name != name) {
    const Thread& other = *meeting.threads[__builtin_ctz(meeting.arrived)];
    report(here() + " is called while thread " + std::to_string(other.number) + " of its warp waits at " +
           meeting.name + " (" + name_of(other.site) + "). All lanes of a mask call the same function.");
  }
  meeting.name = name;
  meeting.lanes[me.lane] = contribution;
  meeting.threads[me.lane] = &me;
  me.site = site;
  const bool orders_memory = contribution.operation == Operation::barrier;
  char* const token = &meeting.tokens[meeting.phase % 2];
  if (orders_memory) release(token);
  meeting.arrived |= 1u << me.lane;
  if (meeting.arrived == (mask & me.warp().alive())) {
    finish(meeting);
  } else {
    suspend(name, site);
  }
  if (orders_memory) acquire(token);
  return meeting.lanes[me.lane].slot;
}

void Team::finish(Meeting& meeting) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!meeting.has(lane)) continue;
    const Contribution& brought = meeting.lanes[lane];
    const Thread& thread = *meeting.threads[lane];
    const std::string_view name = meeting.name;
    if (brought.operation == Operation::shuffle && !meeting.has(brought.source)) {
      const bool masked = meeting.mask >> brought.source & 1;
      std::ostringstream text;
      text << name << " (" << name_of(thread.site) << ") reads lane " << brought.source << ", which "
           << (masked ? "does not exist or has ended" : "is outside its mask " + name_of_mask(meeting.mask))
           << ". Its value is undefined: read only lanes that take part.";
      report(thread, text.str());
    }
    if (brought.operation == Operation::multiply && meeting.arrived != ~0u) {
      report(thread, std::string(name) + " (" + name_of(thread.site) + ") needs all 32 lanes, only " +
                         name_of_mask(meeting.arrived) + " take part. Use blocks of whole warps.");
    }
  }
  carry_out(meeting);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (meeting.has(lane) && meeting.threads[lane] != running_) let_go(*meeting.threads[lane]);
  }
  meeting.arrived = 0;
  ++meeting.phase;
}

// ---- The end of a thread

// Barriers of a block and of a cluster, and warps, do not wait for threads that have ended; a grid's does.
void Team::end(Thread& thread) {
  thread.ended = true;
  --unfinished_;
  poll_done();
  Block& block = *thread.home;
  Warp& warp = thread.warp();
  warp.leave(thread.lane);
  for (Meeting& meeting : warp.meetings()) {
    if (meeting.arrived && meeting.arrived == (meeting.mask & warp.alive())) finish(meeting);
  }
  leave(block.barrier);
  leave(block.cluster->barrier);
  if (block.barrier.expected == 0) block.shared.clear();  // who still reads it from another block: AddressSanitizer
}

void Team::leave(Barrier& barrier) {
  --barrier.expected;
  if (barrier.arrived > 0 && barrier.arrived == barrier.expected) open(barrier);
}

// ---- Fibers

// What a fiber does, launch after launch: it runs the thread it was resumed for, then whichever comes next.
void Team::live() {
  for (;;) {
    Fiber& fiber = *running_->fiber;
    acquire(job_->started);
    try {
      job_->body(job_->arguments);
      release(job_->ended);
      end(*running_);
    } catch (const std::exception& error) {
      error_ = error.what();
    }
    if (!error_.empty()) fiber.switch_to(main_);  // for good
    Thread* next = choose();
    if (next && !next->fiber && !races_are_watched()) {  // no switch: most of the speed of kernels without barriers
      next->fiber = &fiber;
      become(*next);
      continue;
    }
    put_away(fiber);
    if (next) {
      resume(*next, fiber);
    } else {
      fiber.switch_to(main_);
    }
  }
}

void Team::make_fibers(size_t count) {
  constexpr size_t kMostWatched = 8000;  // ThreadSanitizer gives up at 8128 threads
  require(!races_are_watched() || count <= kMostWatched, "ThreadSanitizer follows ", kMostWatched,
          " CUDA threads at once, this launch needs ", count, " (two blocks at a time). Test a smaller one.");
  const Unwatched unwatched;
  while (fibers_.size() < count) {
    const auto entry = [](void* team) { static_cast<Team*>(team)->live(); };
    fibers_.push_back(std::make_unique<Fiber>(job_->stack_bytes, static_cast<unsigned>(fibers_.size()), entry, this));
    put_away(*fibers_.back());
  }
}

Fiber& Team::idle_fiber() {
  if (!idle_first_) make_fibers(fibers_.size() + 1);
  Fiber* fiber = idle_first_;
  idle_first_ = fiber->next_idle;
  return *fiber;
}

// The last one used is the next to serve, as its stack is in the cache; under the race detector they take turns.
void Team::put_away(Fiber& fiber) {
  if (!idle_first_) idle_last_ = &fiber;
  if (races_are_watched() && idle_first_) {
    fiber.next_idle = nullptr;
    idle_last_->next_idle = &fiber;
    idle_last_ = &fiber;
  } else {
    fiber.next_idle = idle_first_;
    idle_first_ = &fiber;
  }
}

}  // namespace gunn::emulator
