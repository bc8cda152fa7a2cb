// The compiled module gunn_ext._core: integers, addresses and strings in, exceptions out. It knows nothing of torch;
// gunn_ext/ops.py checks the tensors and allocates every byte.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <array>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/layer.h"
#include "cpu/dispatch.h"
#ifdef GUNN_WITH_CUDA
#include "cuda/dispatch.h"
#endif

namespace py = pybind11;

namespace gunn {
namespace {

using Address = std::uintptr_t;
using Strides = std::array<int64_t, 4>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

LayerShape make_shape(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t segments,
                      int64_t expansion, int64_t units, bool shortcut, bool residual) {
  for (const auto& [name, value] : {std::pair<const char*, int64_t>{"batch", batch},
                                    {"channels", channels},
                                    {"height", height},
                                    {"width", width},
                                    {"segments", segments},
                                    {"expansion", expansion},
                                    {"units", units}}) {
    require(value >= 1, "LayerShape: ", name, " must be at least 1, got ", value, ".");
  }
  require(channels % segments == 0, "LayerShape: channels (", channels, ") must be divisible by segments (", segments,
          ").");
  // Generous, and far below where a product of these sizes could leave 64 bits.
  require(static_cast<double>(batch) * channels * height * width * (2.0 * expansion + 2) * units < 1e15 &&
              static_cast<double>(channels) * channels * expansion * expansion * units < 1e15,
          "LayerShape: the layer is too large to address.");
  return {batch, channels, height, width, segments, expansion, units, shortcut, residual};
}

Options make_options(const LayerShape& shape, bool batch_statistics, double eps, int threads, int64_t count,
                     bool need_input, bool need_parameters, bool stepwise, int device, Address stream,
                     bool tensor_float, bool pixel_major, bool persistent) {
  require(eps > 0 && eps < std::numeric_limits<double>::infinity(), "Options: eps must be finite and above 0, got ",
          eps, ".");
  require(threads >= 1, "Options: threads must be at least 1, got ", threads, ".");
  require(count >= 0, "Options: count must be at least 0, got ", count, ".");
  const int64_t local = shape.batch * shape.height * shape.width;
  return {batch_statistics, eps,    count ? count : local, threads,      need_input,  need_parameters,
          stepwise,         device, pointer<void>(stream), tensor_float, pixel_major, persistent};
}

// Per unit: reduce, its batch norm's weight and bias, the shortcut's three where there is one, spatial's, project's.
template <class Scalar>
std::vector<UnitTensors<Scalar*>> make_units(const LayerShape& shape, const std::vector<Address>& addresses) {
  const size_t expected = 9 * shape.units + (shape.shortcut ? 3 : 0);
  require(addresses.size() == expected, "expected ", expected, " parameter tensors, got ", addresses.size(), ".");
  std::vector<UnitTensors<Scalar*>> units(shape.units);
  size_t next = 0;
  const auto take = [&] { return pointer<Scalar>(addresses[next++]); };
  for (int64_t m = 0; m < shape.units; ++m) {
    auto& unit = units[m];
    unit = {};
    unit.reduce = take(), unit.reduce_weight = take(), unit.reduce_bias = take();
    if (shape.projects(m)) unit.shortcut = take(), unit.shortcut_weight = take(), unit.shortcut_bias = take();
    unit.spatial = take(), unit.spatial_weight = take(), unit.spatial_bias = take();
    unit.project = take(), unit.project_weight = take(), unit.project_bias = take();
  }
  return units;
}

template <class Scalar>
FeatureMap<Scalar> make_map(Address data, const Strides& strides) {
  return {pointer<Scalar>(data), strides[0], strides[1], strides[2], strides[3]};
}

// Contiguous or channels_last.
bool dense(const LayerShape& shape, const Strides& strides) {
  const auto step = [](int64_t size, int64_t stride, int64_t expected) { return size == 1 || stride == expected; };
  const int64_t width = shape.width, plane = shape.height * width, channels = shape.channels;
  const bool contiguous =
      step(channels, strides[1], plane) && step(shape.height, strides[2], width) && step(width, strides[3], 1);
  const bool channels_last = step(channels, strides[1], 1) && step(shape.height, strides[2], width * channels) &&
                             step(width, strides[3], channels);
  return (contiguous || channels_last) && step(shape.batch, strides[0], channels * plane);
}

template <class Names>
auto named(const Names& names, const std::string& name) {
  for (const auto& [text, value] : names) {
    if (name == text) return value;
  }
  fail("unknown step '", name, "'.");
}
const std::pair<const char*, Forward> kForwardSteps[] = {{"begin", Forward::begin},
                                                         {"reduce", Forward::reduce},
                                                         {"spatial", Forward::spatial},
                                                         {"project", Forward::project},
                                                         {"finish", Forward::finish}};
const std::pair<const char*, Backward> kBackwardSteps[] = {
    {"begin", Backward::begin},   {"project", Backward::project}, {"spatial", Backward::spatial},
    {"reduce", Backward::reduce}, {"input", Backward::input},     {"finish", Backward::finish}};

void check_place(const LayerShape& shape, int64_t segment, int64_t unit) {
  require(segment >= 0 && segment < shape.segments, "segment ", segment, " is not one of the layer's ", shape.segments,
          ".");
  require(unit >= 0 && unit < shape.units, "unit ", unit, " is not one of the layer's ", shape.units, ".");
}

// Calls work(kernels) with the table of the backend that the options ask for. dtypes have torch's names, module aside.
template <class Work>
auto with_kernels(const Options& options, const std::string& dtype, const Work& work) {
  if (options.device < 0) {
    const LevelKernels& kernels = cpu_kernels();
    if (dtype == "float32") return work(kernels.float32);
    if (dtype == "float64") return work(kernels.float64);
    if (dtype == "bfloat16") return work(kernels.bfloat16);
    if (dtype == "float16") return work(kernels.float16);
    fail("the CPU kernels take float64, float32, bfloat16 or float16, got ", dtype, ".");
  }
#ifdef GUNN_WITH_CUDA
  if (dtype == "float32") return work(options.tensor_float ? cuda_tensor_float32 : cuda_float32);
  if (dtype == "float64") return work(cuda_float64);
  if (dtype == "bfloat16") return work(cuda_bfloat16);
  if (dtype == "float16") return work(cuda_float16);
  fail("the CUDA kernels take float64, float32, bfloat16 or float16, got ", dtype, ".");
#else
  fail("gunn_ext was built without CUDA kernels (" GUNN_CUDA_REASON "), but asked to run on GPU ", options.device, ".");
#endif
}

std::tuple<int64_t, int64_t, int64_t, int64_t> sizes(const LayerShape& shape, const Options& options,
                                                     const std::string& dtype, bool keep) {
  return with_kernels(options, dtype, [&](const auto& kernels) -> std::tuple<int64_t, int64_t, int64_t, int64_t> {
    const Sizes sizes = kernels.sizes(shape, options, keep);
    return {sizes.rows, sizes.pixels, sizes.forward_workspace, sizes.backward_workspace};
  });
}

std::tuple<std::string, std::string, std::string, std::string> drivers(const LayerShape& shape, const Options& options,
                                                                       const std::string& dtype, bool keep) {
  const DriverNames names =
      with_kernels(options, dtype, [&](const auto& kernels) { return kernels.drivers(shape, options, keep); });
  return {names.forward, names.backward, names.large_tiles, names.turns};
}

template <class Scalar, class Wide, class Saved>
void forward_on(const Kernels<Scalar, Wide, Saved>& kernels, const LayerShape& shape, const Options& options, Address x,
                const Strides& x_strides, Address y, const Strides& y_strides, const std::vector<Address>& parameters,
                Address statistics, Address saved, Address workspace, const std::string& step, int64_t segment,
                int64_t unit) {
  const auto units = make_units<const Wide>(shape, parameters);
  const ForwardTensors<Scalar, Wide, Saved> tensors{make_map<const Scalar>(x, x_strides),
                                                    make_map<Scalar>(y, y_strides),
                                                    units.data(),
                                                    pointer<Wide>(statistics),
                                                    pointer<Saved>(saved),
                                                    pointer<std::byte>(workspace)};
  if (step.empty()) {
    kernels.forward(shape, options, tensors);
  } else {
    kernels.forward_step(shape, options, tensors, named(kForwardSteps, step), segment, unit);
  }
}

void forward(const LayerShape& shape, const Options& options, const std::string& dtype, Address x,
             const Strides& x_strides, Address y, const Strides& y_strides, const std::vector<Address>& parameters,
             Address statistics, Address saved, Address workspace, const std::string& step, int64_t segment,
             int64_t unit) {
  check_place(shape, segment, unit);
  require(step.empty() != options.stepwise, "Options: stepwise must be set to run steps, and only then.");
  with_kernels(options, dtype, [&](const auto& kernels) {
    forward_on(kernels, shape, options, x, x_strides, y, y_strides, parameters, statistics, saved, workspace, step,
               segment, unit);
  });
}

template <class Scalar, class Wide, class Saved>
void backward_on(const Kernels<Scalar, Wide, Saved>& kernels, const LayerShape& shape, const Options& options,
                 Address grad_y, const Strides& grad_y_strides, Address x, const Strides& x_strides, Address y,
                 const Strides& y_strides, Address grad_x, const Strides& grad_x_strides,
                 const std::vector<Address>& parameters, const std::vector<Address>& grads, Address statistics,
                 Address saved, Address workspace, Address sums, const std::string& step, int64_t segment,
                 int64_t unit) {
  const auto units = make_units<const Wide>(shape, parameters);
  const auto unit_grads = options.need_parameters ? make_units<Wide>(shape, grads) : std::vector<UnitTensors<Wide*>>();
  const BackwardTensors<Scalar, Wide, Saved> tensors{make_map<const Scalar>(grad_y, grad_y_strides),
                                                     make_map<const Scalar>(x, x_strides),
                                                     make_map<const Scalar>(y, y_strides),
                                                     make_map<Scalar>(grad_x, grad_x_strides),
                                                     units.data(),
                                                     unit_grads.data(),
                                                     pointer<const Wide>(statistics),
                                                     pointer<double>(sums),
                                                     pointer<const Saved>(saved),
                                                     pointer<std::byte>(workspace)};
  if (step.empty()) {
    kernels.backward(shape, options, tensors);
  } else {
    kernels.backward_step(shape, options, tensors, named(kBackwardSteps, step), segment, unit);
  }
}

void backward(const LayerShape& shape, const Options& options, const std::string& dtype, Address grad_y,
              const Strides& grad_y_strides, Address x, const Strides& x_strides, Address y, const Strides& y_strides,
              Address grad_x, const Strides& grad_x_strides, const std::vector<Address>& parameters,
              const std::vector<Address>& grads, Address statistics, Address saved, Address workspace, Address sums,
              const std::string& step, int64_t segment, int64_t unit) {
  check_place(shape, segment, unit);
  require(step.empty() != options.stepwise, "Options: stepwise must be set to run steps, and only then.");
  require(step.empty() || sums, "steps of the backward need a buffer of sums.");
  require(options.device >= 0 || !options.need_input || dense(shape, grad_x_strides),
          "grad_x must be contiguous or channels_last on the CPU.");
  with_kernels(options, dtype, [&](const auto& kernels) {
    backward_on(kernels, shape, options, grad_y, grad_y_strides, x, x_strides, y, y_strides, grad_x, grad_x_strides,
                parameters, grads, statistics, saved, workspace, sums, step, segment, unit);
  });
}

// Asks for large pages: the kernels run through all of a workspace again and again, and small pages of a fresh one cost
// a fault each.
void prefer_large_pages(Address begin, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr Address kPage = 2 << 20;
  const Address first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  if (last > first) madvise(pointer<void>(first), last - first, MADV_HUGEPAGE);  // a hint: failing is fine
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = GUNN_VERSION;
  info["compiler"] = GUNN_COMPILER;
#ifdef GUNN_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_reason"] = GUNN_CUDA_REASON;
  info["cuda_architectures"] = GUNN_CUDA_ARCHITECTURES;
  info["cuda_toolkit"] = GUNN_CUDA_TOOLKIT;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  return info;
}

}  // namespace
}  // namespace gunn

PYBIND11_MODULE(_core, m) {
  using namespace gunn;
  using namespace py::literals;
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.doc() = "The compiled kernels of gunn_ext. Only gunn_ext/ops.py calls them.";
  py::register_local_exception<Error>(m, "CoreError", PyExc_RuntimeError);

  // Local to this module: the tests load a second one, whose CUDA kernels are emulated.
  py::class_<LayerShape>(m, "LayerShape", py::module_local())
      .def(py::init(&make_shape), py::kw_only(), "batch"_a, "channels"_a, "height"_a, "width"_a, "segments"_a,
           "expansion"_a, "units"_a, "shortcut"_a, "residual"_a)
      .def_property_readonly("rows", &LayerShape::rows);
  py::class_<Options>(m, "Options", py::module_local())
      .def(py::init(&make_options), "shape"_a, py::kw_only(), "batch_statistics"_a, "eps"_a, "threads"_a, "count"_a = 0,
           "need_input"_a = true, "need_parameters"_a = true, "stepwise"_a = false, "device"_a = -1, "stream"_a = 0,
           "tensor_float"_a = false, "pixel_major"_a = false, "persistent"_a = false);

  m.def("build_info", &build_info);
  m.def("simd_level", &simd_level);
  m.def(
      "multiply_adds", [](int threads, int64_t rounds) { return cpu_kernels().multiply_adds(threads, rounds); },
      "threads"_a, "rounds"_a, release);
  m.def("sizes", &sizes, "shape"_a, "options"_a, "dtype"_a, "keep"_a, release);
  m.def("drivers", &drivers, "shape"_a, "options"_a, "dtype"_a, "keep"_a, release);
  m.def("prefer_large_pages", &prefer_large_pages, "begin"_a, "bytes"_a);
  m.def("forward", &forward, "shape"_a, "options"_a, "dtype"_a, py::kw_only(), "x"_a, "x_strides"_a, "y"_a,
        "y_strides"_a, "parameters"_a, "statistics"_a, "saved"_a, "workspace"_a, "step"_a = "", "segment"_a = 0,
        "unit"_a = 0, release);
  m.def("backward", &backward, "shape"_a, "options"_a, "dtype"_a, py::kw_only(), "grad_y"_a, "grad_y_strides"_a, "x"_a,
        "x_strides"_a, "y"_a, "y_strides"_a, "grad_x"_a, "grad_x_strides"_a, "parameters"_a, "grads"_a, "statistics"_a,
        "saved"_a, "workspace"_a, "sums"_a = 0, "step"_a = "", "segment"_a = 0, "unit"_a = 0, release);
}
