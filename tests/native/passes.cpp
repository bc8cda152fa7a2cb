// Whole passes of the CPU kernels on random data, for sanitizers: `passes` runs every case, `passes --list` names them,
// `passes NAME…` runs some.
//
// Threads are std::threads, as OpenMP's are foreign to ThreadSanitizer. Every buffer is a heap block of exact size. A
// case runs each pass with one, two and three threads and checks that results are finite, have the same bits whatever
// lay in the workspace, and hardly depend on the number of threads nor on being driven step by step.
// `planted=FILE:LINE` leaves out the barrier that stands there, to show that it would be missed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

static std::string left_out;
// The sources are compiled from copies in which every barrier asks.
static bool planted(const char* place) { return left_out == place; }

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace gunn {
namespace {

struct Failure {
  std::string text;
};

template <class T>
class Block {  // of exact size, not zeroed
 public:
  explicit Block(int64_t count) : data_(new T[static_cast<size_t>(count)]), count_(count) {}
  Block(int64_t count, unsigned seed, double scale, double offset = 0) : Block(count) {
    for (int64_t i = 0; i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      data_[i] = static_cast<T>(offset + scale * ((seed >> 8) / 8388608.0 - 1));
    }
  }
  T* data() const { return data_.get(); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<T[]> data_;
  int64_t count_;
};

template <class Work>
void in_parallel(int count, const Work& work) {
  Barrier barrier;
  std::vector<std::thread> others;
  for (int index = 1; index < count; ++index) {
    others.emplace_back([&, index] { work(Team{index, count, &barrier}); });
  }
  work(Team{0, count, &barrier});
  for (std::thread& other : others) other.join();
}

struct Case {
  const char* name;
  LayerShape shape;
};
const Case kCases[] = {
    {"shortcut", {2, 12, 5, 7, 3, 2, 1, true, true}},       {"units", {3, 12, 4, 9, 3, 2, 2, true, true}},
    {"replaced", {2, 10, 3, 5, 2, 3, 1, false, false}},     {"patches", {3, 16, 10, 18, 2, 2, 1, true, true}},
    {"one_image", {1, 16, 8, 8, 2, 2, 1, true, true}},      {"rows_below", {2, 16, 7, 7, 2, 2, 1, false, true}},
    {"single_channels", {5, 6, 6, 5, 6, 2, 1, true, true}}, {"panels", {2, 14, 5, 6, 14, 2, 1, true, true}},
    {"narrow", {3, 16, 20, 3, 2, 2, 1, true, true}},
};

struct Mode {
  bool batch_statistics, keep, steps;
};

template <class Scalar>
class Runner {
  using Numbers = Precision<Scalar>;
  using Results = std::vector<Scalar>;

 public:
  explicit Runner(const LayerShape& shape) : shape_(shape) {
    const int64_t P = shape.segments, k = shape.hidden(), s = shape.segment();
    unsigned seed = 1;
    for (int64_t m = 0; m < shape.units; ++m) {
      const int64_t n = shape.inputs(m), side = shape.projects(m) ? s : 0;
      const int64_t sizes[] = {P * k * n,     P * k, P * k, P * side * n, P * side, P * side,
                               P * k * k * 9, P * k, P * k, P * s * k,    P * s,    P * s};
      for (int j = 0; j < 12; ++j) {
        parameters_.emplace_back(sizes[j], ++seed, j % 3 == 0 ? 0.4 : 0.2, j % 3 == 1 ? 1 : 0);
        gradients_.emplace_back(sizes[j]);
      }
    }
    for (int64_t m = 0; m < shape.units; ++m) {
      units_.push_back(unit<const Scalar*>(parameters_, m));
      grads_.push_back(unit<Scalar*>(gradients_, m));
    }
  }

  // The output, the statistics and every gradient.
  Results run(const Mode& mode, int threads, int fill) {
    const int64_t all = shape_.batch * shape_.channels * shape_.height * shape_.width;
    const Block<Scalar> x(all, 3, 1), grad_y(all, 4, 1), y(all), grad_x(all);
    const Block<Scalar> statistics(2 * shape_.segments * shape_.rows(), 5, 0.2, 1);
    const int64_t kept = shape_.segments * shape_.batch * shape_.rows() * Geometry<Scalar>(shape_).pixels;
    const Block<Scalar> saved(mode.keep ? kept : 1);
    for (int64_t i = 0; i < saved.size(); ++i) saved[i] = std::nan("");
    for (const auto& each : gradients_) std::fill_n(each.data(), each.size(), std::nan(""));
    std::fill_n(y.data(), all, std::nan("")), std::fill_n(grad_x.data(), all, std::nan(""));

    Options options{};
    options.batch_statistics = mode.batch_statistics, options.eps = 1e-5;
    options.count = shape_.batch * shape_.height * shape_.width, options.threads = threads;
    options.need_input = options.need_parameters = true, options.stepwise = mode.steps;
    Scalar* keep = mode.keep ? saved.data() : nullptr;

    using First = ForwardPass<Numbers>;
    using Second = BackwardPass<Numbers>;
    const auto room = [&](int64_t bytes) {
      Block<std::byte> block(bytes);
      std::memset(block.data(), fill, static_cast<size_t>(bytes));
      return block;
    };
    {
      const auto workspace = room(First::workspace_bytes(shape_, options, mode.keep));
      const typename Numbers::Forward tensors{map<const Scalar>(x), map<Scalar>(y), units_.data(),
                                              statistics.data(),    keep,           workspace.data()};
      using Step = Forward;
      each_step<First>(options, tensors, {Step::begin, Step::reduce, Step::spatial, Step::project, Step::finish},
                       false);
    }
    {
      const auto workspace = room(Second::workspace_bytes(shape_, options, mode.keep));
      const Block<double> sums(2 * shape_.segments * shape_.rows());
      const typename Numbers::Backward tensors{map<const Scalar>(grad_y),
                                               map<const Scalar>(x),
                                               map<const Scalar>(y),
                                               map<Scalar>(grad_x),
                                               units_.data(),
                                               grads_.data(),
                                               statistics.data(),
                                               mode.steps ? sums.data() : nullptr,
                                               keep,
                                               workspace.data()};
      using Step = Backward;
      each_step<Second>(options, tensors,
                        {Step::begin, Step::project, Step::spatial, Step::reduce, Step::input, Step::finish}, true);
    }
    Results results;
    const auto append = [&](const Block<Scalar>& block) {
      results.insert(results.end(), block.data(), block.data() + block.size());
    };
    append(y), append(grad_x), append(statistics);
    for (const auto& each : gradients_) append(each);
    return results;
  }

 private:
  template <class Pass, class Tensors, class Step>
  void each_step(const Options& options, const Tensors& tensors, std::initializer_list<Step> steps, bool backwards) {
    Pass pass(shape_, options, tensors);
    if (!options.stepwise) return in_parallel(pass.threads(), [&](const Team& team) { pass.run(team); });
    const auto step = [&](Step which, int64_t i, int64_t m) {
      in_parallel(pass.threads(), [&](const Team& team) { pass.step(team, which, i, m); });
    };
    const Step* const first = steps.begin();
    step(*first, 0, 0);
    const int64_t count = shape_.segments * shape_.units;
    for (int64_t at = 0; at < count; ++at) {
      const int64_t unit = backwards ? count - 1 - at : at;
      for (size_t j = 1; j + 1 < steps.size(); ++j) step(first[j], unit / shape_.units, unit % shape_.units);
    }
    step(first[steps.size() - 1], 0, 0);
  }
  template <class T>
  FeatureMap<T> map(const Block<Scalar>& block) const {
    const int64_t plane = shape_.height * shape_.width;
    return {block.data(), shape_.channels * plane, plane, shape_.width, 1};
  }
  template <class Pointer>
  UnitTensors<Pointer> unit(const std::vector<Block<Scalar>>& blocks, int64_t m) const {
    const auto* b = &blocks[static_cast<size_t>(12 * m)];
    const bool side = shape_.projects(m);
    return {b[0].data(),
            b[1].data(),
            b[2].data(),
            side ? b[3].data() : nullptr,
            side ? b[4].data() : nullptr,
            side ? b[5].data() : nullptr,
            b[6].data(),
            b[7].data(),
            b[8].data(),
            b[9].data(),
            b[10].data(),
            b[11].data()};
  }

  const LayerShape shape_;
  std::vector<Block<Scalar>> parameters_, gradients_;
  std::vector<UnitTensors<const Scalar*>> units_;
  std::vector<UnitTensors<Scalar*>> grads_;
};

template <class Scalar>
void check(const LayerShape& shape, double tolerance) {
  Runner<Scalar> runner(shape);
  for (const Mode mode : {Mode{true, false, false}, Mode{true, true, false}, Mode{false, false, false},
                          Mode{false, true, false}, Mode{true, false, true}}) {
    const auto alone = runner.run({mode.batch_statistics, false, false}, 1, 0x11);
    double size = 0;
    for (const Scalar value : alone) size += static_cast<double>(value) * static_cast<double>(value);
    for (const int threads : {1, 2, 3}) {
      const auto found = runner.run(mode, threads, 0xff), again = runner.run(mode, threads, 0x11);
      if (std::memcmp(found.data(), again.data(), found.size() * sizeof(Scalar)) != 0) {
        throw Failure{"bits depend on what lay in the workspace, " + std::to_string(threads) + " threads"};
      }
      double apart = 0;
      for (size_t i = 0; i < found.size(); ++i) {
        const double difference = static_cast<double>(found[i]) - static_cast<double>(alone[i]);
        apart += difference * difference;
      }
      if (!(apart <= tolerance * tolerance * size)) {  // also where something is not finite
        throw Failure{std::to_string(threads) + " threads differ by " + std::to_string(std::sqrt(apart / size))};
      }
    }
  }
}

int main_(int count, char** arguments) {
  std::vector<std::string> wanted;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--list") {
      for (const Case& each : kCases) std::puts(each.name);
      return 0;
    }
    if (argument.rfind("planted=", 0) == 0) {
      left_out = argument.substr(8);
    } else {
      wanted.push_back(argument);
    }
  }
  for (const Case& each : kCases) {
    bool run = wanted.empty();
    for (const std::string& name : wanted) run = run || name == each.name;
    if (!run) continue;
    try {
      check<float>(each.shape, 1e-4);
      check<double>(each.shape, 1e-10);
    } catch (const Failure& failure) {
      std::fprintf(stderr, "%s: %s\n", each.name, failure.text.c_str());
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace gunn

int main(int count, char** arguments) { return gunn::main_(count, arguments); }
