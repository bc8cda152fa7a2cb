// The drivers of one dtype, and which one a call takes: a function of shape, dtype, device and the variable below,
// never of time.
#pragma once

#include <cstdlib>
#include <cstring>

#include "cuda/persistent.cuh"

namespace gunn {

// GUNN_CUDA_DRIVER, where it is set, has the last word.
inline bool persistent_wanted(const Options& options) {
  const char* wanted = std::getenv("GUNN_CUDA_DRIVER");
  if (wanted == nullptr || *wanted == '\0') return options.persistent;
  const bool persistent = std::strcmp(wanted, "persistent") == 0;
  require(persistent || std::strcmp(wanted, "staged") == 0, "GUNN_CUDA_DRIVER=", wanted,
          ": unknown driver; expected staged or persistent, or nothing for the table's choice.");
  return persistent;
}

template <class Precision>
struct Drivers {
  using Storage = typename Precision::Storage;
  using Wide = typename Precision::Wide;
  static constexpr bool kPersistent = Precision::kTensorCores;

  static Sizes sizes(const LayerShape& shape, const Options& options, bool keep) {
    Sizes sizes{StagedForward<Precision>::saved_rows(shape, options), shape.height * shape.width,
                StagedForward<Precision>::workspace_bytes(shape, options, keep),
                StagedBackward<Precision>::workspace_bytes(shape, options, keep)};
    if constexpr (kPersistent) {
      if (persistent_wanted(options)) {
        PersistentForward<Precision> forward(shape, options);
        PersistentBackward<Precision> backward(shape, options, keep);
        if (forward.takes()) sizes.forward_workspace = forward.workspace_bytes(keep);
        if (backward.takes()) sizes.backward_workspace = backward.workspace_bytes();
      }
    }
    return sizes;
  }
  static DriverNames drivers(const LayerShape& shape, const Options& options, bool keep) {
    DriverNames names{"staged", "staged", StagedBackward<Precision>::large_kernels(shape, options, keep), ""};
    if constexpr (kPersistent) {
      if (persistent_wanted(options)) {
        const PersistentForward<Precision> forward(shape, options);
        const PersistentBackward<Precision> backward(shape, options, keep);
        if (forward.takes()) names.forward = "persistent";
        if (backward.takes()) names.backward = "persistent";
        if (forward.takes() && forward.takes_turns()) names.turns = "forward";
        if (backward.takes() && backward.takes_turns()) names.turns += names.turns.empty() ? "backward" : ", backward";
      }
    }
    return names;
  }
  static void forward(const LayerShape& shape, const Options& options, const ForwardTensors<Storage, Wide>& tensors) {
    if constexpr (kPersistent) {
      if (persistent_wanted(options)) {
        PersistentForward<Precision> persistent(shape, options);
        if (persistent.takes()) return persistent.run(tensors);
      }
    }
    StagedForward<Precision>(shape, options, tensors).run();
  }
  static void forward_step(const LayerShape& shape, const Options& options,
                           const ForwardTensors<Storage, Wide>& tensors, Forward which, int64_t segment, int64_t unit) {
    StagedForward<Precision>(shape, options, tensors).step(which, segment, unit);
  }
  static void backward(const LayerShape& shape, const Options& options, const BackwardTensors<Storage, Wide>& tensors) {
    if constexpr (kPersistent) {
      if (persistent_wanted(options)) {
        PersistentBackward<Precision> persistent(shape, options, tensors.saved != nullptr);
        if (persistent.takes()) return persistent.run(tensors);
      }
    }
    StagedBackward<Precision>(shape, options, tensors).run();
  }
  static void backward_step(const LayerShape& shape, const Options& options,
                            const BackwardTensors<Storage, Wide>& tensors, Backward which, int64_t segment,
                            int64_t unit) {
    StagedBackward<Precision>(shape, options, tensors).step(which, segment, unit);
  }
  static constexpr Kernels<Storage, Wide> table() {
    return {sizes, drivers, forward, forward_step, backward, backward_step};
  }
};

}  // namespace gunn
