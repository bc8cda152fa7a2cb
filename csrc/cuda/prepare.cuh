// What a pass wants before its first stage, in one launch: weights packed, batch norms as tables, counters and words
// cleared. A small layer's pass is short beside a dozen launches.
//
// Owns:      a block has kPlaces places of one task; the tasks lie in the kernel's parameters.
// Costs:     reads weights once, writes them packed; one launch for kMostTasks tasks.
#pragma once

#include "cuda/host.cuh"

namespace gunn {

template <class Precision>
struct Task {
  enum class Kind { pack, tables, clear } kind;
  int64_t count;   // places
  unsigned begin;  // its first block
  // pack: weight, and shortcut or null; tables: a batch norm's weight and bias
  const typename Precision::Wide *first, *second;
  Pack pack;
  int unit;
  typename Precision::Element* packed;
  NormRows norm;
  unsigned* cleared;
};

template <class Precision>
struct Tasks {
  static constexpr int kMostTasks = 16, kPlaces = 128;

  Extents extents;
  Tables<typename Precision::Wide> tables;
  TableSource<typename Precision::Wide> source;
  int count;
  Task<Precision> task[kMostTasks];
};

template <class Precision>
__global__ void __launch_bounds__(Tasks<Precision>::kPlaces) prepare(GUNN_PARAMETER Tasks<Precision> tasks) {
  using Kind = typename Task<Precision>::Kind;
  int which = 0;
  while (which + 1 < tasks.count && blockIdx.x >= tasks.task[which + 1].begin) ++which;
  const Task<Precision>& task = tasks.task[which];
  const int64_t at = static_cast<int64_t>(blockIdx.x - task.begin) * Tasks<Precision>::kPlaces + threadIdx.x;
  if (at >= task.count) return;
  if (task.kind == Kind::pack) {
    pack_weight<Precision>(tasks.extents, task.pack, task.unit, at, task.first, task.second, task.packed);
  } else if (task.kind == Kind::tables) {
    make_tables(task.norm, at, tasks.extents.segments, task.first, task.second, tasks.source, tasks.tables);
  } else {
    task.cleared[at] = 0;
  }
}

// Collects tasks; run() launches what has not been.
template <class Precision>
class Preparation {
  using Wide = typename Precision::Wide;
  using Kind = typename Task<Precision>::Kind;
  using Units = UnitTensors<const Wide*>;

 public:
  Preparation(const Launcher& launcher, const Extents& extents) : launcher_(launcher) { tasks_.extents = extents; }

  // All segments of one unit.
  void pack(Pack pack, int m, const Units& unit, typename Precision::Element* to) {
    const bool spatial = pack == Pack::spatial || pack == Pack::spatial_transposed;
    const bool reduce = pack == Pack::reduce || pack == Pack::reduce_transposed;
    Task<Precision> task{};
    task.kind = Kind::pack, task.pack = pack, task.unit = m, task.packed = to;
    task.first = spatial ? unit.spatial : reduce ? unit.reduce : unit.project;
    task.second = reduce ? unit.shortcut : nullptr;
    add(task, packed_size<Precision>(tasks_.extents, pack, m));
  }
  // Of every batch norm; once.
  void tables(const Units* units, const TableSource<Wide>& source, const Tables<Wide>& tables) {
    const Extents& e = tasks_.extents;
    tasks_.source = source, tasks_.tables = tables;
    for (int m = 0; m < e.units; ++m) {
      for (const Norm norm : {Norm::reduce, Norm::shortcut, Norm::spatial, Norm::project}) {
        if (norm == Norm::shortcut && !e.projects(m)) continue;
        const int channels = e.channels_of(norm), rows = e.row(Norm::reduce, e.units);
        Task<Precision> task{};
        task.kind = Kind::tables;
        task.norm = {channels, padded(channels), e.row(norm, m), rows, e.z_row(norm, m), e.z_rows()};
        task.first = norm_weight(units[m], norm), task.second = norm_bias(units[m], norm);
        add(task, static_cast<int64_t>(e.segments) * padded(channels));
      }
    }
  }
  void clear(unsigned* data, int64_t count) {
    Task<Precision> task{};
    task.kind = Kind::clear, task.cleared = data;
    add(task, count);
  }

  void run() {
    if (tasks_.count == 0) return;
    launch(Launch{"prepare", dim3(blocks_), dim3(Tasks<Precision>::kPlaces), 0, launcher_.stream, &launcher_.shape},
           prepare<Precision>, tasks_);
    tasks_.count = 0, blocks_ = 0;
  }

 private:
  void add(Task<Precision> task, int64_t count) {
    if (count == 0) return;
    if (tasks_.count == Tasks<Precision>::kMostTasks) run();
    task.count = count, task.begin = blocks_;
    blocks_ += static_cast<unsigned>((count + Tasks<Precision>::kPlaces - 1) / Tasks<Precision>::kPlaces);
    tasks_.task[tasks_.count++] = task;
  }

  const Launcher& launcher_;
  Tasks<Precision> tasks_{};
  unsigned blocks_ = 0;
};

}  // namespace gunn
