// Runs whole passes of the CPU core on std::threads, so that ThreadSanitizer sees every synchronisation (OpenMP's own
// it cannot see), and compares the bits with a second run. Built and run by tests/test_core.py.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/backward.h"
#include "cpu/forward.h"

namespace gunn {
namespace {

using Floats = std::vector<float>;

// Small, fixed numbers without a pattern.
Floats numbers(int64_t count, uint32_t seed) {
  Floats values(count);
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / 16777216.0f - 0.5f;
  }
  return values;
}

template <class Work>
void on_threads(int count, const Work& work) {
  Barrier barrier;
  std::vector<std::thread> threads;
  for (int index = 1; index < count; ++index) threads.emplace_back([&, index] { work(Team{index, count, &barrier}); });
  work(Team{0, count, &barrier});
  for (auto& thread : threads) thread.join();
}

struct Tensors {
  std::vector<Floats> storage;
  std::vector<UnitTensors<const float*>> read;
  std::vector<UnitTensors<float*>> write;
};

Tensors make_units(const LayerShape& shape) {
  Tensors made;
  const int64_t P = shape.segments, k = shape.hidden(), s = shape.segment();
  made.storage.reserve(12 * shape.units);
  const auto take = [&](int64_t count) {
    made.storage.push_back(numbers(count, static_cast<uint32_t>(made.storage.size()) + 1));
    return made.storage.back().data();
  };
  for (int64_t m = 0; m < shape.units; ++m) {
    UnitTensors<float*> unit{};
    unit.reduce = take(P * k * shape.inputs(m)), unit.reduce_weight = take(P * k), unit.reduce_bias = take(P * k);
    if (shape.projects(m)) {
      unit.shortcut = take(P * s * shape.inputs(m)), unit.shortcut_weight = take(P * s);
      unit.shortcut_bias = take(P * s);
    }
    unit.spatial = take(P * k * k * 9), unit.spatial_weight = take(P * k), unit.spatial_bias = take(P * k);
    unit.project = take(P * s * k), unit.project_weight = take(P * s), unit.project_bias = take(P * s);
    made.write.push_back(unit);
    made.read.push_back({unit.reduce, unit.reduce_weight, unit.reduce_bias, unit.shortcut, unit.shortcut_weight,
                         unit.shortcut_bias, unit.spatial, unit.spatial_weight, unit.spatial_bias, unit.project,
                         unit.project_weight, unit.project_bias});
  }
  return made;
}

struct Outcome {
  Floats y, grad_x, statistics;
  Tensors grads;
};

Outcome run(const LayerShape& shape, Options options, bool keep) {
  const int64_t pixels = shape.height * shape.width, size = shape.batch * shape.channels * pixels;
  const auto map = [&](auto* data) {
    return FeatureMap<std::remove_reference_t<decltype(*data)>>{data, shape.channels * pixels, pixels, shape.width, 1};
  };
  Outcome out;
  const Tensors units = make_units(shape);
  const Floats x = numbers(size, 91), grad_y = numbers(size, 92);
  out.y.resize(size), out.grad_x.resize(size);
  out.statistics = numbers(2 * shape.segments * shape.rows(), 93);
  for (float& value : out.statistics) value = value * value + 0.1f;
  const int64_t laid_out = Geometry<float>(shape).pixels;
  Floats saved(keep ? shape.segments * shape.batch * shape.rows() * laid_out : 0);
  std::vector<std::byte> workspace(ForwardPass<float>::workspace_bytes(shape, options, keep));
  ForwardPass<float> forward(shape, options,
                             {map(x.data()), map(out.y.data()), units.read.data(), out.statistics.data(),
                              keep ? saved.data() : nullptr, workspace.data()});
  on_threads(options.threads, [&](const Team& team) { forward.run(team); });

  out.grads = make_units(shape);
  workspace.assign(BackwardPass<float>::workspace_bytes(shape, options, keep), std::byte{0xff});
  BackwardPass<float> backward(shape, options,
                               {map(grad_y.data()), map(x.data()), map(static_cast<const float*>(out.y.data())),
                                map(out.grad_x.data()), units.read.data(), out.grads.write.data(),
                                out.statistics.data(), nullptr, keep ? saved.data() : nullptr, workspace.data()});
  on_threads(options.threads, [&](const Team& team) { backward.run(team); });
  return out;
}

bool same(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace
}  // namespace gunn

int main() {
  using namespace gunn;
  const LayerShape shapes[] = {
      {3, 6, 3, 5, 3, 2, 1, true, true}, {4, 6, 4, 4, 2, 1, 3, false, false}, {2, 4, 2, 9, 4, 2, 2, true, true}};
  int different = 0;
  for (const LayerShape& shape : shapes) {
    for (const bool batch_statistics : {true, false}) {
      for (const bool keep : {false, true}) {
        Options options{batch_statistics, 1e-5, shape.batch * shape.height * shape.width, 3, true, true, false};
        const Outcome first = run(shape, options, keep), second = run(shape, options, keep);
        different += !same(first.y, second.y) + !same(first.grad_x, second.grad_x);
        different += !same(first.statistics, second.statistics);
        for (size_t t = 0; t < first.grads.storage.size(); ++t) {
          different += !same(first.grads.storage[t], second.grads.storage[t]);
        }
        for (const float value : first.grad_x) different += value != value;
      }
    }
  }
  std::printf("%d tensors differ between runs\n", different);
  return different != 0;
}
