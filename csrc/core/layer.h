// What a layer is, as plain sizes and pointers: the vocabulary shared by the bindings and every backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gunn {

// Sizes and options that fix the mathematics. Short names of the paper: N channels, P segments, s = N/P, k = K*s.
struct LayerShape {
  int64_t batch, channels, height, width;
  int64_t segments;
  int64_t expansion;
  int64_t units;
  bool shortcut;  // a projection 1x1 -> BN beside the first unit
  bool residual;  // add the update to the segment; false replaces the segment

  int64_t segment() const { return channels / segments; }
  int64_t hidden() const { return expansion * segment(); }
  int64_t inputs(int64_t unit) const { return unit == 0 ? channels : segment(); }
  bool projects(int64_t unit) const { return shortcut && unit == 0; }
  int64_t reduce_rows(int64_t unit) const { return hidden() + (projects(unit) ? segment() : 0); }

  // Rows of one segment's statistics, per unit in this order: reduce (k), shortcut (s, unit 0), spatial (k), project
  // (s).
  int64_t unit_rows(int64_t unit) const { return 2 * hidden() + segment() + (projects(unit) ? segment() : 0); }
  int64_t unit_row(int64_t unit) const { return unit == 0 ? 0 : unit_rows(0) + (unit - 1) * unit_rows(1); }
  int64_t rows() const { return unit_row(units); }
};

struct Options {
  bool batch_statistics;  // normalise with the batch's own statistics; false: with the given ones
  double eps;
  int64_t count;  // values per channel behind the statistics; batch*height*width unless several processes share them
  int threads;
  bool need_input;            // backward: write the gradient of the input
  bool need_parameters;       // backward: write the gradients of the parameters
  bool stepwise;              // driven step by step: every image stays in the workspace between calls
  int device = -1;            // of the GPU whose kernels run; -1: the CPU's
  void* stream = nullptr;     // a cudaStream_t of that device
  bool tensor_float = false;  // a GPU may multiply float32 with 10 bits of mantissa (TF32)
  bool pixel_major = false;   // the caller's word that x, y and grad_x lie as the GPU's kernels want them (state.cuh)
  bool persistent = false;    // the persistent driver is to serve a GPU's layers that it takes
  int64_t block = 0;          // GPU backward: segments recomputed at once; 0: as many as memory allows
};

// 16-bit storage, as bits: bfloat16 and IEEE half.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A feature map (B, C, H, W) of any strides, in elements.
template <class Scalar>
struct FeatureMap {
  Scalar* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, column = 0;
};

// The tensors of one unit, stacked over segments and contiguous. Shortcut pointers are null where there is none.
template <class Pointer>
struct UnitTensors {
  Pointer reduce, reduce_weight, reduce_bias;        // (P, k, n_in), (P, k), (P, k)
  Pointer shortcut, shortcut_weight, shortcut_bias;  // (P, s, N), (P, s), (P, s)
  Pointer spatial, spatial_weight, spatial_bias;     // (P, k, k, 3, 3), (P, k), (P, k)
  Pointer project, project_weight, project_bias;     // (P, s, k), (P, s), (P, s)
};

// Feature maps are stored as Scalar, pre-activations for the backward as Saved; parameters, statistics and gradients of
// parameters are Wide: float32 at least.
template <class Scalar, class Wide = Scalar, class Saved = Scalar>
struct ForwardTensors {
  FeatureMap<const Scalar> x;
  FeatureMap<Scalar> y;
  const UnitTensors<const Wide*>* units;
  Wide* statistics;  // (2, P, rows): mean and biased variance; written with batch statistics, else only read
  Saved* saved;      // pre-activations for the backward (Sizes), or null: recompute them
  std::byte* workspace;
};

template <class Scalar, class Wide = Scalar, class Saved = Scalar>
struct BackwardTensors {
  FeatureMap<const Scalar> grad_y, x, y;
  FeatureMap<Scalar> grad_x;  // dense on the CPU, which keeps the gradient of the state there
  const UnitTensors<const Wide*>* units;
  const UnitTensors<Wide*>* grads;
  const Wide* statistics;  // as the forward left them
  double* sums;            // (2, P, rows): sum of d and of d*(z - mean) at every BN output; steps only, else null
  const Saved* saved;      // from the forward, or null
  std::byte* workspace;
};

// The steps of a pass. Between two of them a caller may put something of its own: steps that say "exchange" leave
// statistics (forward) or sums (backward) that the following step reads.
enum class Forward { begin, reduce /*exchange*/, spatial /*exchange*/, project /*exchange*/, finish };
enum class Backward { begin, project /*exchange*/, spatial /*exchange*/, reduce /*exchange*/, input, finish };

struct Sizes {
  int64_t rows, pixels;  // of one image's saved pre-activations: (P, B, rows, pixels), in the backend's own order
  int64_t forward_workspace, backward_workspace;  // bytes
};

struct DriverNames {
  const char *forward, *backward;
  std::string large_tiles;  // kernels of the GPU's staged driver that take them here, by name
  std::string turns;        // passes of its persistent driver in which not all of the layer finds room at once
};

// One backend at one instruction set and dtype.
template <class Scalar, class Wide = Scalar, class Saved = Scalar>
struct Kernels {
  Sizes (*sizes)(const LayerShape&, const Options&, bool keep);
  DriverNames (*drivers)(const LayerShape&, const Options&, bool keep);  // which of several serve
  void (*forward)(const LayerShape&, const Options&, const ForwardTensors<Scalar, Wide, Saved>&);
  void (*forward_step)(const LayerShape&, const Options&, const ForwardTensors<Scalar, Wide, Saved>&, Forward,
                       int64_t segment, int64_t unit);
  void (*backward)(const LayerShape&, const Options&, const BackwardTensors<Scalar, Wide, Saved>&);
  void (*backward_step)(const LayerShape&, const Options&, const BackwardTensors<Scalar, Wide, Saved>&, Backward,
                        int64_t segment, int64_t unit);
};

}  // namespace gunn
