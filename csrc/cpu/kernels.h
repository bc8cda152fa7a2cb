// The table of one instruction set's kernels. Only level.cpp includes this.
#pragma once

#include <omp.h>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/peak.h"

namespace gunn {
namespace {

// One parallel region a call, and none for one thread: a forked child may then call us safely.
template <class Work>
void in_parallel(int threads, const Work& work) {
  if (threads == 1) {
    work(Team{0, 1, nullptr});
    return;
  }
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  work(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
}

template <class Precision>
Sizes sizes(const LayerShape& shape, const Options& options, bool keep) {
  return {shape.rows(), Geometry<typename Precision::Scalar>(shape, kDepth<typename Precision::Factor>).pixels,
          ForwardPass<Precision>::workspace_bytes(shape, options, keep),
          BackwardPass<Precision>::workspace_bytes(shape, options, keep)};
}

template <class Precision>
void forward(const LayerShape& shape, const Options& options, const typename Precision::Forward& tensors) {
  ForwardPass<Precision> pass(shape, options, tensors);
  in_parallel(pass.threads(), [&](const Team& team) { pass.run(team); });
}

template <class Precision>
void forward_step(const LayerShape& shape, const Options& options, const typename Precision::Forward& tensors,
                  Forward which, int64_t segment, int64_t unit) {
  ForwardPass<Precision> pass(shape, options, tensors);
  in_parallel(pass.threads(), [&](const Team& team) { pass.step(team, which, segment, unit); });
}

template <class Precision>
void backward(const LayerShape& shape, const Options& options, const typename Precision::Backward& tensors) {
  BackwardPass<Precision> pass(shape, options, tensors);
  in_parallel(pass.threads(), [&](const Team& team) { pass.run(team); });
}

template <class Precision>
void backward_step(const LayerShape& shape, const Options& options, const typename Precision::Backward& tensors,
                   Backward which, int64_t segment, int64_t unit) {
  BackwardPass<Precision> pass(shape, options, tensors);
  in_parallel(pass.threads(), [&](const Team& team) { pass.step(team, which, segment, unit); });
}

// On each of `threads` threads; returns the FLOPs of all.
inline double multiply_adds(int threads, int64_t rounds) {
  double each = 0;
  in_parallel(threads, [&](const Team& team) {
    const double done = multiply_add_registers(rounds);
    if (team.index == 0) each = done;
  });
  return each * threads;
}

inline DriverNames drivers(const LayerShape&, const Options&, bool) { return {"fused", "fused", "", ""}; }

template <class Precision>
constexpr typename Precision::Table kernels() {
  return {sizes<Precision>,        drivers, forward<Precision>, forward_step<Precision>, backward<Precision>,
          backward_step<Precision>};
}

}  // namespace
}  // namespace gunn
