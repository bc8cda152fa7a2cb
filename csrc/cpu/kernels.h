// The table of one instruction set's kernels. Only level.cpp includes this.
#pragma once

#include <omp.h>

#include "cpu/backward.h"
#include "cpu/forward.h"

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

template <class Scalar>
Sizes sizes(const LayerShape& shape, const Options& options, bool keep) {
  return {shape.rows(), Geometry<Scalar>(shape).pixels, ForwardPass<Scalar>::workspace_bytes(shape, options, keep),
          BackwardPass<Scalar>::workspace_bytes(shape, options, keep)};
}

template <class Scalar>
void forward(const LayerShape& shape, const Options& options, const ForwardTensors<Scalar>& tensors) {
  ForwardPass<Scalar> pass(shape, options, tensors);
  in_parallel(pass.threads(), [&](const Team& team) { pass.run(team); });
}

template <class Scalar>
void forward_step(const LayerShape& shape, const Options& options, const ForwardTensors<Scalar>& tensors, Forward which,
                  int64_t segment, int64_t unit) {
  ForwardPass<Scalar> pass(shape, options, tensors);
  in_parallel(pass.threads(), [&](const Team& team) { pass.step(team, which, segment, unit); });
}

template <class Scalar>
void backward(const LayerShape& shape, const Options& options, const BackwardTensors<Scalar>& tensors) {
  BackwardPass<Scalar> pass(shape, options, tensors);
  in_parallel(pass.threads(), [&](const Team& team) { pass.run(team); });
}

template <class Scalar>
void backward_step(const LayerShape& shape, const Options& options, const BackwardTensors<Scalar>& tensors,
                   Backward which, int64_t segment, int64_t unit) {
  BackwardPass<Scalar> pass(shape, options, tensors);
  in_parallel(pass.threads(), [&](const Team& team) { pass.step(team, which, segment, unit); });
}

inline DriverNames drivers(const LayerShape&, const Options&, bool) { return {"fused", "fused"}; }

template <class Scalar>
constexpr Kernels<Scalar> kernels() {
  return {sizes<Scalar>, drivers, forward<Scalar>, forward_step<Scalar>, backward<Scalar>, backward_step<Scalar>};
}

}  // namespace
}  // namespace gunn
