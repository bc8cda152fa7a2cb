// Statistics over all pixels from tiles of them: a tree of fan-in 32, climbed by whichever block comes last.
//
// Owns:      entry e of level 0 is tile e's; of 32 neighbours the last block to arrive combines them, in order, into
// one
//            entry of the next level and climbs on. The block that reaches the top publishes the result.
// Barriers:  none between blocks: an arrival is one acquire-release addition to a counter of its group. What the other
//            threads of a block wrote before the block's barrier is ordered before it. Counters are zero before and
//            after: a captured graph can be replayed.
// Needs:     every block of blockIdx.x at one blockIdx.y, the columns of that blockIdx.y.
// Costs:     16 bytes a tile and column, written and read once; log32(tiles) waits for memory.
//
// Which block climbs is left to chance; what it computes is not, so results have the same bits every run.
#pragma once

#include "cuda/view.cuh"

namespace gunn {

constexpr int kFan = 32;

// Where a tree lives; `partials` null: nobody asks for statistics.
struct Exchange {
  Pair* partials = nullptr;
  unsigned* counters = nullptr;
  int64_t tiles = 0;
  int64_t groups = 0;  // counters of one column tile, all levels
  int columns = 0;     // of all column tiles

  static __host__ GUNN_DEVICE int64_t up(int64_t entries) { return (entries + kFan - 1) / kFan; }
  static int64_t count_groups(int64_t tiles) {
    int64_t groups = 0;
    for (; tiles > 1; tiles = up(tiles)) groups += up(tiles);
    return groups;
  }
  static int64_t count_entries(int64_t tiles) {
    int64_t entries = 0;
    for (; tiles > 1; tiles = up(tiles)) entries += tiles;
    return entries;
  }
};

// Mean and squared deviations of `count` values (Chan et al.).
struct Moments {
  double count = 0, mean = 0, squares = 0;

  GUNN_DEVICE void merge(Pair other, double others) {
    const double total = count + others, apart = other.a - mean;
    if (total == 0) return;
    mean += apart * (others / total);
    squares += other.b + apart * apart * (count * (others / total));
    count = total;
  }
  GUNN_DEVICE Pair pair() const { return {mean, squares}; }
};

// Two plain sums.
struct Sums {
  double a = 0, b = 0;

  GUNN_DEVICE void merge(Pair other, double /*count*/) { a += other.a, b += other.b; }
  GUNN_DEVICE Pair pair() const { return {a, b}; }
};

// The thread's column of the tile. Threads that are left share it: each takes every `parts`-th of what there is.
struct Share {
  int column, part, parts;
  bool active;  // the column exists, and the thread has a part

  GUNN_DEVICE Share(int columns, int threads) : parts(max(threads / columns, 1)) {
    column = threadIdx.x % columns, part = threadIdx.x / columns;
    active = part < parts;
  }
  // The one that speaks for its column.
  GUNN_DEVICE bool leads() const { return part == 0; }
};

// Adds what the threads of a column have, in order; those that lead, or all, get the sum.
template <class Pool>
GUNN_DEVICE Pair add_parts(Pool& pool, const Share& share, int columns, Pair mine) {
  pool.parts[threadIdx.x] = mine;
  __syncthreads();
  Pair sum{0, 0};
  for (int part = 0; part < share.parts; ++part) {
    const Pair each = pool.parts[part * columns + share.column];
    sum.a += each.a, sum.b += each.b;
  }
  __syncthreads();
  return sum;
}

// `value` is the tile's own pair of the thread's column. True in the one block that has that of all tiles, in `value`
// of the threads that lead. `first_column` is the tile's among all columns, `pixels` those of all tiles.
template <class Kind, class Precision, class Tile>
GUNN_DEVICE bool climb(Pool<Precision, Tile>& pool, const Exchange& exchange, const Share& share, int columns,
                       int first_column, int64_t pixels, Pair* value) {
  Pair* level = exchange.partials + first_column + share.column;
  unsigned* counters = exchange.counters + blockIdx.y * exchange.groups;
  int64_t entries = exchange.tiles, entry = blockIdx.x, size = Tile::kRows;
  while (entries > 1) {
    if (share.leads()) level[entry * exchange.columns] = *value;
    const int64_t group = entry / kFan, first = group * kFan;
    const int members = static_cast<int>(min(entries - first, static_cast<int64_t>(kFan)));
    __syncthreads();
    if (threadIdx.x == 0) {
      const bool last = add_acquire_release(counters + group, 1u) == static_cast<unsigned>(members) - 1;
      if (last) store_relaxed(counters + group, 0u);
      pool.last = last;
    }
    __syncthreads();
    if (!pool.last) return false;
    const auto values_of = [&](int64_t e) { return static_cast<double>(min(size, pixels - e * size)); };
    Kind kind;
    if (share.active) {
      for (int64_t e = first + share.part; e < first + members; e += share.parts) {
        kind.merge(level[e * exchange.columns], values_of(e));
      }
    }
    pool.parts[threadIdx.x] = kind.pair();
    __syncthreads();
    // The others' counts are told by the entries they had.
    if (share.leads()) {
      for (int part = 1; part < share.parts; ++part) {
        double others = 0;
        for (int64_t e = first + part; e < first + members; e += share.parts) others += values_of(e);
        kind.merge(pool.parts[part * columns + share.column], others);
      }
    }
    *value = kind.pair();
    __syncthreads();
    level += entries * exchange.columns;
    counters += Exchange::up(entries);
    entries = Exchange::up(entries), entry = group, size *= kFan;
  }
  return true;
}

}  // namespace gunn
