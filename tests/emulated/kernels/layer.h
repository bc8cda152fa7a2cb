// Whole passes of the layer on random data, through the table of kernels of one dtype: a program includes this file,
// then the dtype's source, and ends with LAYER(table, whether the persistent driver takes it). For the emulator only.
//
// Every buffer is a heap block of exact size. A case runs its pass several times and checks that results are finite and
// have the same bits whatever lay in the workspace, whether pre-activations were kept or recomputed, in one call or in
// steps; and that nothing was written but results. It prints a hash of them, for comparison between processes.
//
// Cases that name the processors of their device run on the persistent driver, which has no steps: these are compared
// with a backward in more launches, with a workspace that another pass has used, and with kept pre-activations.
//
// Cases of large tiles take these for every product that can have them.
//
// `passes=1` runs a case only once, `backward=no` without its backward. `planted=…` leaves something out, to show that
// it would be missed:
//
//   tile.cuh:12      what that line says: a barrier; to wait for copies; to send a word, the first of epoch 2; to wait
//                    for one
//   stale:tile.cuh:12, late:tile.cuh:12   that word with the epoch before; to wait for one group of copies less
//   launch:clear     every launch of that name
//   relaxed          the tree's additions order nothing
//   counter          the tree's counters are not reset
//   piece:2          one byte of the pass's third piece of workspace
//   any other word   what planted("word") stands for in the sources
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "cuda/words.cuh"
#include "harness.h"

namespace gunn::test {

// What `planted=…` says, taken apart once.
struct Plant {
  std::string manner, what = option("planted"), where;
  int number = -1;

  Plant() {
    for (const char* each : {"stale:", "late:"}) {
      if (what.rfind(each, 0) == 0) manner = each, what.erase(0, manner.size());
    }
    const size_t colon = what.find(':');
    if (colon == std::string::npos) return;
    where = what.substr(colon + 1);
    what.resize(colon);
    if (what != "launch") number = std::stoi(where);
  }
  static const Plant& get() {
    static const Plant plant;
    return plant;
  }
  bool leaves_out(emulator::Site site) const {
    return site.line == number && std::string(site.file).find("cuda/" + what) != std::string::npos;
  }
};

inline bool planted(const char* what) { return Plant::get().what == what; }

// With these names the kernels below are compiled.
inline void barrier(emulator::Site site = emulator::Site::here()) {
  if (!Plant::get().leaves_out(site)) __syncthreads(site);
}
inline void warp_barrier(emulator::Site site = emulator::Site::here()) {
  if (!Plant::get().leaves_out(site)) __syncwarp(~0u, site);
}
template <int pending>
void wait_for_copies(emulator::Site site = emulator::Site::here()) {
  if (!Plant::get().leaves_out(site)) return copy_async_wait<pending>();
  if (Plant::get().manner == "late:") copy_async_wait<pending + 1>();
}
inline void send_word(Word* word, uint32_t bits, unsigned epoch, emulator::Site site = emulator::Site::here()) {
  static std::atomic<bool> done{false};
  if (epoch == 2 && Plant::get().leaves_out(site) && !done.exchange(true)) {
    if (Plant::get().manner != "stale:") return;
    --epoch;
  }
  send_bits(word, bits, epoch);
}
inline void send_word(Word* word, float value, unsigned epoch, emulator::Site site = emulator::Site::here()) {
  send_word(word, __float_as_uint(value), epoch, site);
}
template <int count, class At>
void receive_words(uint32_t (&values)[count], unsigned epoch, const char* what, const At& at,
                   emulator::Site site = emulator::Site::here()) {
  if (!Plant::get().leaves_out(site)) return receive(values, epoch, what, at);
  for (int j = 0; j < count; ++j) values[j] = at(j) == nullptr ? 0 : static_cast<uint32_t>(load_relaxed(at(j)));
}
inline unsigned arrive(unsigned* counter, unsigned value) {
  return Plant::get().what == "relaxed" ? atomicAdd(counter, value) : add_acquire_release(counter, value);
}
inline void reset(unsigned* counter, unsigned value) {
  if (Plant::get().what != "counter") store_relaxed(counter, value);
}
template <class Kernel, class... Arguments>
void launch_unless_planted(const Launch& how, Kernel kernel, Arguments&&... arguments) {
  if (Plant::get().what == "launch" && Plant::get().where == how.name) return;
  launch(how, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace gunn::test

// Under AddressSanitizer every piece of the workspace ends in bytes that nobody may touch.
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define Arena ArenaWithoutEnds
#include "core/arena.h"
#undef Arena

namespace gunn {

class Arena {
 public:
  explicit Arena(std::byte* base) : pieces_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = pieces_.take<T>(count);
    const std::byte* end = pieces_.take<std::byte>(kGap) + kGap;
    const std::byte* data_end = reinterpret_cast<std::byte*>(piece + count);
    const test::Plant& plant = test::Plant::get();
    if (plant.what == "piece" && plant.number == taken_ && piece && count > 0) --data_end;
    if (piece) __asan_poison_memory_region(data_end, end - data_end);
    ++taken_;
    return piece;
  }
  int64_t bytes() const { return pieces_.bytes(); }

 private:
  static constexpr int64_t kGap = 64;
  ArenaWithoutEnds pieces_;
  int taken_ = 0;
};

}  // namespace gunn
#endif

#define __syncthreads() ::gunn::test::barrier()
#define __syncwarp() ::gunn::test::warp_barrier()
#define copy_async_wait ::gunn::test::wait_for_copies
#define send(...) ::gunn::test::send_word(__VA_ARGS__)
#define send_bits(...) ::gunn::test::send_word(__VA_ARGS__)
#define receive(...) ::gunn::test::receive_words(__VA_ARGS__)
#define add_acquire_release(...) ::gunn::test::arrive(__VA_ARGS__)
#define store_relaxed(...) ::gunn::test::reset(__VA_ARGS__)
#define launch(...) ::gunn::test::launch_unless_planted(__VA_ARGS__)
#include "cuda/drivers.cuh"
#undef __syncthreads
#undef __syncwarp
#undef copy_async_wait
#undef send
#undef send_bits
#undef receive
#undef add_acquire_release
#undef store_relaxed
#undef launch

namespace gunn::test {

enum class Layout { nchw, channels_last, slice /* every second column of rows with a margin */ };

struct Setup {
  LayerShape shape;  // batch, channels, height, width, segments, expansion, units, shortcut, residual
  bool batch_statistics = true, need_input = true, need_parameters = true;
  Layout layout = Layout::nchw;
  bool one_gradient = false;          // grad_y is a single value, expanded
  int processors = 0, shared_kb = 0;  // of the persistent driver's device; 0: the staged driver, all a device has
  const char* tile = "";              // of the staged driver; else by size
};

// Small, fixed numbers without a pattern.
class Numbers {
 public:
  explicit Numbers(uint32_t seed) : state_(seed * 2654435761u + 1) {}
  float next() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(state_ >> 8) / 16777216.0f - 0.5f;
  }

 private:
  uint32_t state_;
};

// A heap block of exact size, its first bytes all the same until written.
template <class T>
struct Tensor : Buffer<T> {
  explicit Tensor(size_t count, unsigned char byte = 0xff) : Buffer<T>(count) {
    std::memset(static_cast<void*>(this->data()), byte, count * sizeof(T));
  }
  Tensor& random(uint32_t seed) {
    Numbers numbers(seed);
    for (size_t i = 0; i < this->size(); ++i) (*this)[i] = from_float<T>(numbers.next());
    return *this;
  }
};

// What a pass left, and what it may not have changed, as bytes.
class Results {
 public:
  template <class T>
  void add(const std::string& name, Tensor<T>& tensor) {
    for (size_t i = 0; i < tensor.size(); ++i) {
      const double value = to_float(tensor[i]);
      if (!(value - value == 0)) wrong(name, i, " is not finite");
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(tensor.data());
    tensors_[name].assign(bytes, bytes + tensor.size() * sizeof(T));
  }
  void expect_equal(const Results& other, const char* why) const {
    for (const auto& [name, bytes] : tensors_) {
      const auto& others = other.tensors_.at(name);
      for (size_t i = 0; i < bytes.size(); ++i) {
        if (bytes[i] != others[i]) wrong(name, i, std::string(" (byte) ") + why);
      }
    }
  }
  uint64_t hash() const {
    uint64_t hash = 14695981039346656037u;
    for (const auto& entry : tensors_) {
      for (const unsigned char byte : entry.second) hash = (hash ^ byte) * 1099511628211u;
    }
    return hash;
  }

 private:
  [[noreturn]] static void wrong(const std::string& name, size_t index, const std::string& how) {
    throw WrongValue(name + "[" + std::to_string(index) + "]" + how);
  }
  std::map<std::string, std::vector<unsigned char>> tensors_;
};

template <class T>
struct Parameters {
  std::vector<std::unique_ptr<Tensor<T>>> tensors;
  std::vector<UnitTensors<T*>> units;

  explicit Parameters(const LayerShape& shape) {
    const int64_t P = shape.segments, k = shape.hidden(), s = shape.segment();
    const auto take = [&](int64_t count) {
      tensors.push_back(std::make_unique<Tensor<T>>(count));
      return tensors.back()->data();
    };
    for (int64_t m = 0; m < shape.units; ++m) {
      UnitTensors<T*> unit{};
      unit.reduce = take(P * k * shape.inputs(m)), unit.reduce_weight = take(P * k), unit.reduce_bias = take(P * k);
      if (shape.projects(m)) {
        unit.shortcut = take(P * s * shape.inputs(m));
        unit.shortcut_weight = take(P * s), unit.shortcut_bias = take(P * s);
      }
      unit.spatial = take(P * k * k * 9), unit.spatial_weight = take(P * k), unit.spatial_bias = take(P * k);
      unit.project = take(P * s * k), unit.project_weight = take(P * s), unit.project_bias = take(P * s);
      units.push_back(unit);
    }
  }
  std::vector<UnitTensors<const T*>> to_read() const {
    std::vector<UnitTensors<const T*>> read;
    for (const UnitTensors<T*>& u : units) {
      read.push_back({u.reduce, u.reduce_weight, u.reduce_bias, u.shortcut, u.shortcut_weight, u.shortcut_bias,
                      u.spatial, u.spatial_weight, u.spatial_bias, u.project, u.project_weight, u.project_bias});
    }
    return read;
  }
  void add_to(Results& results, const std::string& name) {
    for (size_t i = 0; i < tensors.size(); ++i) results.add(name + std::to_string(i), *tensors[i]);
  }
};

// Strides of a map (B, C, H, W), no data.
template <class T>
FeatureMap<T> strides(const LayerShape& shape, Layout layout) {
  const int64_t C = shape.channels, H = shape.height, W = shape.width;
  if (layout == Layout::channels_last) return {nullptr, H * W * C, 1, W * C, C};
  if (layout == Layout::slice) return {nullptr, C * H * (2 * W + 3), H * (2 * W + 3), 2 * W + 3, 2};
  return {nullptr, C * H * W, H * W, W, 1};
}
template <class T>
size_t extent(const LayerShape& shape, const FeatureMap<T>& map) {
  return 1 + (shape.batch - 1) * map.batch + (shape.channels - 1) * map.channel + (shape.height - 1) * map.row +
         (shape.width - 1) * map.column;
}
template <class To, class From>
FeatureMap<To> at(const FeatureMap<From>& strides, To* data) {
  return {data, strides.batch, strides.channel, strides.row, strides.column};
}

struct Manner {
  bool keep, stepwise;
  unsigned char workspace;  // every byte of it
  bool used = false;        // but then a forward of other data had it
  int64_t block = 0;        // segments of the backward at once
};

template <class Scalar, class Wide>
Results run_pass(const Kernels<Scalar, Wide>& kernels, const Setup& setup, const Manner& manner) {
  const LayerShape& shape = setup.shape;
  const int64_t pixels = shape.height * shape.width, rows = shape.segments * shape.rows();
  Options options{setup.batch_statistics, 1e-5,           shape.batch * pixels, 1, setup.need_input,
                  setup.need_parameters,  manner.stepwise};
  options.block = manner.block;
  options.pixel_major = setup.layout == Layout::channels_last && shape.channels % 8 == 0;
  const Sizes sizes = kernels.sizes(shape, options, manner.keep);

  const auto x_strides = strides<Scalar>(shape, setup.layout);
  const bool dense = setup.layout != Layout::slice;
  const auto y_strides = dense ? x_strides : strides<Scalar>(shape, Layout::nchw);
  const FeatureMap<Scalar> g_strides = setup.one_gradient ? FeatureMap<Scalar>{} : y_strides;
  Tensor<Scalar> x(extent(shape, x_strides)), y(extent(shape, y_strides)), grad_y(extent(shape, g_strides));
  x.random(1), grad_y.random(2);
  Parameters<Wide> parameters(shape), grads(shape);
  for (size_t i = 0; i < parameters.tensors.size(); ++i) parameters.tensors[i]->random(10 + i);
  Tensor<Wide> statistics(2 * rows);
  if (!setup.batch_statistics) {
    statistics.random(3);
    for (int64_t i = rows; i < 2 * rows; ++i) statistics[i] = statistics[i] * statistics[i] + 0.1f;
  }
  Tensor<Scalar> saved(manner.keep ? shape.segments * shape.batch * sizes.rows * sizes.pixels : 0);
  const auto units = parameters.to_read();

  // One after another: a step may rely on nothing but the tensors.
  Results before;
  before.add("x", x), parameters.add_to(before, "parameter ");
  if (!setup.batch_statistics) before.add("statistics", statistics);
  {
    Tensor<std::byte> workspace(sizes.forward_workspace, manner.workspace);
    ForwardTensors<Scalar, Wide> tensors{at(x_strides, static_cast<const Scalar*>(x.data())),
                                         at(y_strides, y.data()),
                                         units.data(),
                                         statistics.data(),
                                         manner.keep ? saved.data() : nullptr,
                                         workspace.data()};
    if (manner.used) {
      Tensor<Scalar> other(x.size());
      tensors.x.data = other.random(4).data();
      kernels.forward(shape, options, tensors);
      tensors.x.data = x.data();
    }
    if (!manner.stepwise) {
      kernels.forward(shape, options, tensors);
    } else {
      const auto step = [&](Forward which, int64_t i, int64_t m) {
        kernels.forward_step(shape, options, tensors, which, i, m);
      };
      step(Forward::begin, 0, 0);
      for (int64_t i = 0; i < shape.segments; ++i) {
        for (int64_t m = 0; m < shape.units; ++m) {
          for (const Forward which : {Forward::reduce, Forward::spatial, Forward::project}) step(which, i, m);
        }
      }
      step(Forward::finish, 0, 0);
    }
  }
  Results after;
  after.add("x", x), parameters.add_to(after, "parameter "), after.add("statistics", statistics);
  before.expect_equal(after, "was changed by the forward");
  after.add("y", y), after.add("grad_y", grad_y), after.add("saved", saved);
  Results made;
  made.add("y", y), made.add("statistics", statistics);
  if (option("backward") == "no") return made;

  Tensor<Scalar> grad_x(setup.need_input ? extent(shape, y_strides) : 0);
  {
    Tensor<std::byte> workspace(sizes.backward_workspace, manner.workspace);
    Tensor<double> sums(manner.stepwise ? 2 * rows : 0);
    const BackwardTensors<Scalar, Wide> tensors{at(g_strides, static_cast<const Scalar*>(grad_y.data())),
                                                at(x_strides, static_cast<const Scalar*>(x.data())),
                                                at(y_strides, static_cast<const Scalar*>(y.data())),
                                                at(y_strides, setup.need_input ? grad_x.data() : nullptr),
                                                units.data(),
                                                setup.need_parameters ? grads.units.data() : nullptr,
                                                statistics.data(),
                                                manner.stepwise ? sums.data() : nullptr,
                                                manner.keep ? saved.data() : nullptr,
                                                workspace.data()};
    if (!manner.stepwise) {
      kernels.backward(shape, options, tensors);
    } else {
      const auto step = [&](Backward which, int64_t i, int64_t m) {
        kernels.backward_step(shape, options, tensors, which, i, m);
      };
      step(Backward::begin, 0, 0);
      for (int64_t i = shape.segments - 1; i >= 0; --i) {
        for (int64_t m = shape.units - 1; m >= 0; --m) {
          for (const Backward which : {Backward::project, Backward::spatial, Backward::reduce, Backward::input}) {
            step(which, i, m);
          }
        }
      }
      step(Backward::finish, 0, 0);
      Results results;
      results.add("sums", sums);
    }
  }
  Results results;
  results.add("x", x), results.add("y", y), results.add("grad_y", grad_y), results.add("saved", saved);
  results.add("statistics", statistics), parameters.add_to(results, "parameter ");
  after.expect_equal(results, "was changed by the backward");

  if (setup.need_input) made.add("grad_x", grad_x);
  if (setup.need_parameters) grads.add_to(made, "gradient ");
  return made;
}

// The device, and the driver it takes.
template <class Scalar, class Wide>
void prepare(const Kernels<Scalar, Wide>& kernels, const Setup& setup) {
  const auto set = [](const char* name, const std::string& value) {
    value.empty() ? unsetenv(name) : setenv(name, value.c_str(), 1);
  };
  const auto number = [](int value) { return value == 0 ? std::string() : std::to_string(value); };
  set("GUNN_CUDA_DRIVER", setup.processors == 0 ? "" : "persistent");
  set("GUNN_CUDA_TILE", setup.tile);
  set("GUNN_EMULATOR_PROCESSORS", number(setup.processors));
  set("GUNN_EMULATOR_SHARED_KB", number(setup.shared_kb));
  const Options options{
      setup.batch_statistics, 1e-5, setup.shape.batch * setup.shape.height * setup.shape.width, 1, true, true, false};
  const DriverNames drivers = kernels.drivers(setup.shape, options, false);
  const std::string expected = setup.processors == 0 ? "staged" : "persistent";
  for (const std::string driver : {drivers.forward, drivers.backward}) {
    if (driver != expected) throw WrongValue("it is the driver: " + driver);
  }
}

// A workspace of NaNs, then one of large numbers.
template <class Scalar, class Wide>
void check(const char* name, const Kernels<Scalar, Wide>& kernels, const Setup& setup) {
  const bool steps = setup.batch_statistics && setup.need_input && setup.need_parameters;
  const std::vector<std::pair<Manner, const char*>> staged = {
      {{false, steps, 0xff}, "differs in steps"},
      {{true, false, 0xff}, "depends on what is kept"},
      {{false, false, 0x5a}, "depends on what lay in the workspace"}};
  const std::vector<std::pair<Manner, const char*>> persistent = {
      {{false, false, 0x5a, true}, "depends on what an earlier pass left in the workspace"},
      {{false, false, 0xff, false, 2}, "depends on blocks of segments"},
      {{true, false, 0x5a}, "depends on what is kept"}};
  const auto& others = setup.processors == 0 ? staged : persistent;
  const std::string passes = option("passes");
  const size_t most = passes.empty() ? others.size() : std::stoi(passes) - 1;
  prepare(kernels, setup);
  const Results first = run_pass(kernels, setup, {false, false, 0xff});
  for (size_t i = 0; i < std::min(most, others.size()); ++i) {
    first.expect_equal(run_pass(kernels, setup, others[i].first), others[i].second);
  }
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(first.hash()));
}

inline const std::vector<std::pair<const char*, Setup>>& setups() {
  static const std::vector<std::pair<const char*, Setup>> all = {
      {"shortcut", {{3, 6, 5, 7, 3, 2, 1, true, true}}},
      {"units", {{2, 4, 6, 6, 2, 1, 3, false, false}}},
      {"units_with_shortcut", {{1, 4, 9, 8, 2, 3, 2, true, true}}},
      {"one_channel_segments", {{2, 3, 4, 9, 3, 1, 1, true, false}}},
      {"one_row", {{6, 4, 1, 13, 2, 2, 1, false, true}}},
      {"one_pixel", {{1, 4, 1, 1, 2, 2, 1, true, true}, false}},
      {"given_statistics", {{2, 4, 7, 5, 2, 2, 2, true, true}, false}},
      {"no_input", {{2, 4, 7, 5, 2, 2, 1, true, true}, true, false, true}},
      {"no_parameters", {{2, 4, 7, 5, 2, 2, 1, true, true}, true, true, false}},
      {"given_statistics_no_parameters", {{2, 4, 7, 5, 2, 2, 1, false, true}, false, true, false}},
      {"column_tiles", {{1, 68, 9, 8, 2, 2, 1, true, true}}},
      {"channels_last", {{2, 6, 5, 7, 3, 2, 1, true, true}, true, true, true, Layout::channels_last}},
      {"slice", {{2, 6, 5, 7, 3, 2, 1, true, true}, true, true, true, Layout::slice, true}},
      {"eights", {{1, 32, 9, 8, 2, 1, 1, true, true}}},  // no channel is padding
      {"eights_channels_last", {{2, 32, 7, 5, 2, 1, 2, false, true}, true, true, true, Layout::channels_last}},
      {"two_levels", {{3, 2, 23, 31, 1, 2, 1, true, true}}},
      {"two_blocks_of_segments", {{3, 4, 23, 31, 4, 16, 8, false, true}}},  // in float64; takes seconds
  };
  return all;
}

inline Setup on(int processors, Setup setup, int shared_kb = 0) {
  setup.processors = processors, setup.shared_kb = shared_kb;
  return setup;
}
inline Setup given(Setup setup) {
  setup.batch_statistics = false;
  return setup;
}
// Of k 8 and s 4 unless they say otherwise, four segments: every turn of a slot comes twice. `wide`: of 4 bytes, whose
// channels are streamed by other blocks.
template <bool wide>
const std::vector<std::pair<const char*, Setup>>& persistent_setups() {
  const Setup bands{{1, 16, 11, 16, 4, 2, 1, true, true}};  // of 4, 4 and 3 rows
  static const std::vector<std::pair<const char*, Setup>> all = {
      {"persistent_images", on(4, {{3, 16, 6, 7, 4, 2, 1, true, true}})},
      {"persistent_images_given", on(4, given({{3, 16, 6, 7, 4, 2, 1, false, false}}))},
      {"persistent_bands", on(4, bands)},
      {"persistent_bands_given", on(4, given(bands))},
      {"persistent_wide", on(4, {{2, 36, 8, 8, 3, 2, 1, true, true}})},  // k 24, s 12
      {"persistent_wide_no_shortcut",
       on(4, {{2, 36, 7, 9, 3, 2, 1, false, false}, true, true, true, Layout::channels_last})},
      {"persistent_streamed", on(2, {{1, 36, wide ? 16 : 17, 16, 3, 2, 1, true, true}}, wide ? 112 : 88)},
      {"persistent_streamed_bands_given",
       on(3, given({{1, 36, wide ? 17 : 33, 16, 3, 2, 1, true, true}}), wide ? 76 : 88)},
      // An earlier pass's words have the right epoch.
      {"persistent_one_segment", on(4, {{1, 4, 11, 16, 1, 2, 1, true, true}})},
      {"persistent_one_segment_given", on(4, given({{1, 4, 11, 16, 1, 2, 1, true, true}}))},
      {"persistent_eights", on(2, {{1, 32, 8, 8, 4, 1, 1, true, true}})},  // k and s 8: no channel is padding
      {"persistent_no_input", on(4, {{3, 16, 6, 7, 4, 2, 1, true, true}, true, false, true})},
      {"persistent_no_parameters", on(4, {{3, 16, 6, 7, 4, 2, 1, true, true}, true, true, false})},
      {"persistent_given_no_parameters", on(4, given({{3, 16, 6, 7, 4, 2, 1, true, true}, true, true, false}))},
      {"persistent_eights_channels_last",
       on(2, {{1, 32, 8, 8, 4, 1, 1, true, true}, true, true, true, Layout::channels_last})},
      {"persistent_eights_given", on(2, given({{1, 32, 16, 8, 4, 1, 1, true, true}}))},
      // Two blocks: six bands with an exchange; else four, an image after the other.
      {"persistent_turns", on(3, {{2, 16, 3, 200, 4, 2, 1, true, true}})},
      {"persistent_turns_given", on(3, given({{2, 16, 3, 200, 4, 2, 1, true, true}}))},
      {"persistent_turns_no_input",
       on(3, {{5, 12, 3, 7, 3, 2, 1, true, false}, true, false, true, Layout::channels_last})},
      {"persistent_turns_no_parameters", on(3, {{5, 12, 3, 7, 3, 2, 1, false, true}, true, true, false})},
  };
  return all;
}
// k 80, s 40: weights come through a ring.
template <bool wide>
const std::vector<std::pair<const char*, Setup>>& ring_setups() {
  static const std::vector<std::pair<const char*, Setup>> all = {
      {"persistent_ring", on(3, {{1, 120, 1, 40, 3, 2, 1, false, true}})},
      {"persistent_ring_given", on(3, given({{1, 120, 1, 40, 3, 2, 1, false, true}}))},
      {"persistent_ring_turns", on(2, {{2, 80, 1, 40, 2, 2, 1, false, true}})},                      // of one block
      {"persistent_ring_streamed", on(2, {{1, 114, 5, 6, 3, 2, 1, false, false}}, wide ? 84 : 66)},  // k 76, s 38
  };
  return all;
}
// k 112, s 40, and a second unit.
inline const std::vector<std::pair<const char*, Setup>>& unit_setups() {
  static const std::vector<std::pair<const char*, Setup>> all = {
      {"persistent_units", on(2, {{1, 108, 1, 40, 3, 3, 2, true, true}})},
  };
  return all;
}

inline Setup large(Setup setup) {
  setup.tile = "large";
  return setup;
}
inline const std::vector<std::pair<const char*, Setup>>& large_setups() {
  static const std::vector<std::pair<const char*, Setup>> all = {
      {"large_units", large({{1, 4, 9, 15, 1, 3, 2, true, true}})},      // two tiles of pixels, the last one of 7
      {"large_windows", large({{1, 4, 17, 31, 2, 1, 1, false, true}})},  // of pixels in a range: five
      {"large_columns", large({{1, 168, 2, 3, 8, 1, 1, true, false}})},  // of the state: two tiles
  };
  return all;
}

template <class Scalar, class Wide>
bool add_cases(const Kernels<Scalar, Wide>& kernels, bool persistent) {
  const auto add = [&](const auto& setups) {
    for (const auto& entry : setups) {
      cases()[entry.first] = [&kernels, &entry] { check(entry.first, kernels, entry.second); };
    }
  };
  add(setups());
  if (persistent) add(persistent_setups<sizeof(Scalar) == 4>());
  if (persistent) add(ring_setups<sizeof(Scalar) == 4>());
  if (persistent && sizeof(Scalar) == 2) add(unit_setups());
  if (sizeof(Scalar) == 2) add(large_setups());
  return true;
}

}  // namespace gunn::test

#define LAYER(table, persistent) static const bool added = ::gunn::test::add_cases(::gunn::table, persistent)
