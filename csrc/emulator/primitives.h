// What a kernel may ask of the emulator. Everything that waits takes the line it was called from, for the reports.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/vocabulary.h"

namespace gunn::emulator {

struct Site {
  const char* file = "";
  int line = 0;

  // As a default argument this is the place of the outermost call.
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator!=(const Site& other) const { return line != other.line || file != other.file; }
};

// What one lane hands to its warp.
struct Slot {
  uint32_t words[8];
};

enum class Format { bfloat16, float16, tf32 };

// Barriers. The block's returns how many threads came with a true vote, and how many came.
struct Votes {
  unsigned yes, all;
};
Votes block_barrier(const char* name, bool vote, Site site);
void cluster_barrier(Site site);
void grid_barrier(Site site);

// Functions of a warp: every lane of the mask takes part, and only the barrier orders memory.
void warp_barrier(unsigned mask, Site site);
Slot shuffle(const char* name, unsigned mask, const Slot& value, unsigned source, Site site);
struct Pointers {
  const void* of[4];
};
Pointers gather(const char* name, const void* mine, unsigned sources, Site site);  // a lane in each byte; whole warps
unsigned ballot(const char* name, unsigned mask, bool vote, Site site);
void multiply(Format format, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
unsigned lane();

int processors();      // of the device
size_t most_shared();  // bytes of one block

// Shared memory: heap blocks of exact size, filled with ones (a NaN in every format) when the block starts.
void* shared_array(const void* key, size_t bytes);  // the block's array declared at `key`
void* dynamic_shared();
unsigned cluster_rank();
unsigned cluster_size();
void* remote_shared(void* mine, unsigned rank, Site site);  // the same place in another block of the cluster
void check_initialised(const void* begin, size_t items, size_t item_bytes, Site site);

// Asynchronous copies: the target is filled with ones at once and gets its value when the thread waits.
void copy_async(void* shared, const void* global, unsigned bytes, bool valid, Site site);
void commit_copies();
void wait_copies(unsigned pending);

// Waiting for a value. `poll_again` lets the others go on and fails the launch when every thread waits.
void poll_again(const char* what, Site site);
void poll_done();
void interleave();  // under a seed, perhaps lets another thread go first
void fence();

// A launch, as checked and run by launch.cpp. Throws gunn::Error.
struct Configuration {
  dim3 grid, block, cluster;
  size_t shared;
  bool cooperative;
};
void run(const Configuration& configuration, void (*body)(void*), void* arguments);

}  // namespace gunn::emulator
