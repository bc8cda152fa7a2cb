// Small programs of test cases: `program case…` runs each and says nothing when all is well.
//
// Ends with 0; 1: a wrong value; 3: a gunn::Error, its text on stderr. `program --list` names the cases; `name=value`
// before them is an option. Cases take their memory as Buffers, so the same file also runs on a GPU when nvcc compiled
// it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <string>

#include "cuda/launch.cuh"

namespace gunn::test {

// ThreadSanitizer takes about 1 MB and 0.5 ms for each CUDA thread that exists at the same time.
#ifdef __SANITIZE_THREAD__
constexpr unsigned kLargestBlock = 256;
#else
constexpr unsigned kLargestBlock = 1024;
#endif

// Global memory of exact size: a heap block, or managed memory on a GPU.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, T value = T{}) : count_(count) {
#ifdef __CUDACC__
    require(cudaMallocManaged(&data_, count * sizeof(T)) == cudaSuccess, "no GPU memory for ", count, " elements.");
#else
    data_ = new T[count];
#endif
    for (size_t i = 0; i < count; ++i) data_[i] = value;
  }
  ~Buffer() {
#ifdef __CUDACC__
    cudaFree(data_);
#else
    delete[] data_;
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

inline void finish() {
#ifdef __CUDACC__
  const cudaError_t error = cudaDeviceSynchronize();
  require(error == cudaSuccess, "kernel failed: ", cudaGetErrorString(error), ".");
#endif
}

struct WrongValue : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class T, class U>
void expect_equal(const std::string& what, size_t index, T found, U expected) {
  if (found == static_cast<T>(expected)) return;
  std::ostringstream text;
  text << what << "[" << index << "] is " << +found << ", expected " << +expected;
  throw WrongValue(text.str());
}

inline std::map<std::string, std::function<void()>>& cases() {
  static std::map<std::string, std::function<void()>> all;
  return all;
}

inline std::map<std::string, std::string>& options() {
  static std::map<std::string, std::string> all;
  return all;
}
inline std::string option(const std::string& name) { return options()[name]; }

struct Register {
  Register(const char* name, std::function<void()> body) { cases()[name] = std::move(body); }
};

#define CASE(name)                                                         \
  static void case_##name();                                               \
  static const ::gunn::test::Register register_##name(#name, case_##name); \
  static void case_##name()

inline int run(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "--list") {
    for (const auto& entry : cases()) std::cout << entry.first << "\n";
    return 0;
  }
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const size_t equals = argument.find('=');
    if (equals != std::string::npos) {
      options()[argument.substr(0, equals)] = argument.substr(equals + 1);
      continue;
    }
    try {
      cases().at(arguments[i])();
    } catch (const WrongValue& wrong) {
      std::cerr << arguments[i] << ": " << wrong.what() << "\n";
      return 1;
    } catch (const Error& error) {
      std::cerr << arguments[i] << ": " << error.what() << "\n";
      return 3;
    }
  }
  return 0;
}

}  // namespace gunn::test

// Weak, as a Python module has several of these files.
__attribute__((weak)) int main(int count, char** arguments) { return gunn::test::run(count, arguments); }
