// Shared memory of one block, and one thread's asynchronous copies into it.
#pragma once

#include <cstddef>
#include <vector>

#include "emulator/primitives.h"

namespace gunn::emulator {

// Bytes of a block on an H100 or H200: together, and of static arrays.
constexpr size_t kMostStatic = 48 * 1024;

// Every array is a heap block of its own and of exact size, so that AddressSanitizer sees its ends. All bytes start as
// ones: a NaN in every floating-point format, and one that no arithmetic makes.
class SharedMemory {
 public:
  static constexpr unsigned char kUnwritten = 0xff;

  SharedMemory() = default;
  ~SharedMemory() { clear(); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void* array(const void* key, size_t bytes);  // made when first asked for
  void* dynamic() const { return dynamic_; }
  void make_dynamic(size_t bytes);
  void clear();

  // The same place in another block's memory; null if `mine` lies in none of the arrays.
  void* same_place(const void* mine, SharedMemory& other) const;
  bool contains(const void* begin, size_t bytes) const;
  size_t bytes() const;

 private:
  struct Array {
    const void* key;
    char* begin;
    size_t bytes;
  };
  const Array* find(const void* place) const;
  void* add(const void* key, size_t bytes);

  std::vector<Array> arrays_;
  void* dynamic_ = nullptr;
};

// Copies land as late as they may, when the thread waits for them. Until then the target holds ones: whoever reads it
// too early, or still needed what was there, sees NaN.
class Copies {
 public:
  void add(void* to, const void* from, unsigned bytes);
  void commit() { ++open_; }
  void wait(unsigned pending);
  void clear();

 private:
  struct Copy {
    void* to;
    const void* from;  // null: zeros
    unsigned bytes, group;
  };
  std::vector<Copy> copies_;
  unsigned open_ = 0;  // the group that the next commit closes
};

}  // namespace gunn::emulator
