// The kernel's side of the scheduler: finds the running thread and checks what was asked of it.
#include "emulator/primitives.h"

#include <sstream>

#include "core/error.h"
#include "emulator/report.h"
#include "emulator/sanitizers.h"
#include "emulator/team.h"

namespace gunn::emulator {
namespace {

Thread& thread() { return *static_cast<Thread*>(const_cast<Coordinates*>(self)); }

std::string called(const char* name, Site site) { return std::string(name) + " (" + name_of(site) + ")"; }

}  // namespace

unsigned lane() { return thread().lane; }

Votes block_barrier(const char* name, bool vote, Site site) {
  return thread().team->wait_at(thread().home->barrier, name, vote, site);
}

void cluster_barrier(Site site) {
  Cluster& cluster = *thread().home->cluster;
  thread().team->wait_at(cluster.barrier, "cluster_barrier", false, site);
  cluster.met = true;
}

void grid_barrier(Site site) {
  Team& team = *thread().team;
  if (!team.job().configuration.cooperative) {
    team.report(called("grid_barrier", site) + " in a launch that is not cooperative: set Launch::cooperative.");
  }
  team.wait_at(team.grid(), "grid_barrier", false, site);
}

void warp_barrier(unsigned mask, Site site) { thread().team->meet(mask, "__syncwarp", {Operation::barrier}, site); }

Slot shuffle(const char* name, unsigned mask, const Slot& value, unsigned source, Site site) {
  Contribution contribution{Operation::shuffle};
  contribution.source = source;
  contribution.slot = value;
  return thread().team->meet(mask, name, contribution, site);
}

Pointers gather(const char* name, const void* mine, unsigned sources, Site site) {
  Contribution contribution{Operation::gather};
  contribution.source = sources;
  std::memcpy(contribution.slot.words, &mine, sizeof mine);
  const Slot slot = thread().team->meet(~0u, name, contribution, site);
  Pointers pointers;
  std::memcpy(&pointers, slot.words, sizeof pointers);
  return pointers;
}

unsigned ballot(const char* name, unsigned mask, bool vote, Site site) {
  Contribution contribution{Operation::ballot};
  contribution.slot.words[0] = vote;
  return thread().team->meet(mask, name, contribution, site).words[0];
}

void multiply(Format format, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  Contribution contribution{Operation::multiply, format};
  for (int i = 0; i < 4; ++i) contribution.slot.words[i] = a[i];
  for (int i = 0; i < 2; ++i) contribution.slot.words[4 + i] = b[i];
  const Slot product = thread().team->meet(~0u, "mma", contribution, site);
  for (int i = 0; i < 4; ++i) c[i] += bit_cast<float>(product.words[i]);
}

void* shared_array(const void* key, size_t bytes) {
  Block& block = *thread().home;
  void* array = block.shared.array(key, bytes);
  const Job& job = thread().team->job();
  const size_t all = block.shared.bytes(), dynamic = job.configuration.shared;
  if (all - dynamic > kMostStatic || all > job.most_shared) {
    thread().team->report(std::to_string(all - dynamic) + " bytes of static and " + std::to_string(dynamic) +
                          " bytes of dynamic shared memory; a block has at most " + std::to_string(kMostStatic) +
                          " static and " + std::to_string(job.most_shared) + " together. Use a smaller tile.");
  }
  return array;
}

void* dynamic_shared() { return thread().home->shared.dynamic(); }

unsigned cluster_rank() { return thread().home->rank; }
unsigned cluster_size() { return thread().home->cluster->size; }

void* remote_shared(void* mine, unsigned rank, Site site) {
  Team& team = *thread().team;
  Block& block = *thread().home;
  const Cluster& cluster = *block.cluster;
  if (rank >= cluster.size) {
    team.report(called("remote_shared", site) + " asks for block " + std::to_string(rank) + " of a cluster of " +
                std::to_string(cluster.size) + ".");
  }
  if (!cluster.met) {
    team.report(called("remote_shared", site) +
                " before any cluster_barrier: the other block may not have started. Put one before it.");
  }
  Block& other = cluster.blocks[rank];
  if (other.barrier.expected == 0) {
    team.report(called("remote_shared", site) + ": block " + std::to_string(rank) +
                " of the cluster has ended, and its shared memory with it. Put a cluster_barrier before the end.");
  }
  void* theirs = block.shared.same_place(mine, other.shared);
  if (!theirs) team.report(called("remote_shared", site) + ": the pointer is not into this block's shared memory.");
  return theirs;
}

void check_initialised(const void* begin, size_t items, size_t item_bytes, Site site) {
  const unsigned char* bytes = static_cast<const unsigned char*>(begin);
  for (size_t item = 0; item < items; ++item) {
    bool written = false;
    for (size_t i = 0; i < item_bytes; ++i) written |= bytes[item * item_bytes + i] != SharedMemory::kUnwritten;
    if (!written) {
      thread().team->report(called("check_initialised", site) + ": element " + std::to_string(item) + " of " +
                            std::to_string(items) + " was never written. Write it, or wait for who does.");
    }
  }
}

void copy_async(void* shared, const void* global, unsigned bytes, bool valid, Site site) {
  Team& team = *thread().team;
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes) {
    team.report(called("copy_async", site) + " of " + std::to_string(bytes) +
                " bytes: both addresses must be multiples of the size.");
  }
  if (!thread().home->shared.contains(shared, bytes)) {
    team.report(called("copy_async", site) + ": its " + std::to_string(bytes) +
                "-byte target does not lie in one array of this block's shared memory.");
  }
  thread().copies.add(shared, valid ? global : nullptr, bytes);
}

void commit_copies() { thread().copies.commit(); }
void wait_copies(unsigned pending) { thread().copies.wait(pending); }

void poll_again(const char* what, Site site) { thread().team->poll_again(what, site); }
void poll_done() { thread().team->poll_done(); }

void interleave() {
  if (self) thread().team->interleave();
}

void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

}  // namespace gunn::emulator
