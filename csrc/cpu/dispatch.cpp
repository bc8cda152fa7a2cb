#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>

#include "core/error.h"

namespace gunn {
namespace {

struct Level {
  const char* name;
  bool (*supported)();
  const LevelKernels* kernels;
};

#ifdef GUNN_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
#endif

// Best first.
const Level kLevels[] = {
#ifdef GUNN_X86
    {"avx512bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }, &kernels_avx512bf16},
    {"avx512", has_avx512, &kernels_avx512},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, &kernels_avx2},
#endif
    {"baseline", [] { return true; }, &kernels_baseline},
};

const Level& choose() {
  const char* wanted = std::getenv("GUNN_SIMD");
  if (wanted && *wanted) {
    for (const Level& level : kLevels) {
      if (std::strcmp(level.name, wanted) != 0) continue;
      require(level.supported(), "GUNN_SIMD=", wanted, ": this CPU lacks it; unset GUNN_SIMD to use the best it has.");
      return level;
    }
    fail("GUNN_SIMD=", wanted, ": unknown instruction set; expected avx512bf16, avx512, avx2 or baseline.");
  }
  for (const Level& level : kLevels) {
    if (level.supported()) return level;
  }
  fail("no CPU kernels were built for this machine.");
}

const Level& chosen() {
  static const Level& level = choose();
  return level;
}

}  // namespace

const char* simd_level() { return chosen().name; }

const LevelKernels& cpu_kernels() { return *chosen().kernels; }

}  // namespace gunn
