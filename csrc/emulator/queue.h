// A queue of threads that never allocates while a kernel runs.
#pragma once

#include <cstddef>
#include <random>
#include <utility>
#include <vector>

namespace gunn::emulator {

struct Thread;

class Queue {
 public:
  // Empty, with room for `count` threads.
  void reset(size_t count) {
    size_t capacity = 1;
    while (capacity < count) capacity *= 2;
    if (items_.size() < capacity) items_.resize(capacity);
    head_ = size_ = 0;
  }
  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }

  void push(Thread* thread) { at(size_++) = thread; }
  Thread* pop() {
    Thread* thread = at(0);
    ++head_;
    --size_;
    return thread;
  }
  Thread* pop_any(std::mt19937_64& random) {
    std::swap(at(0), at(random() % size_));
    return pop();
  }

 private:
  Thread*& at(size_t i) { return items_[(head_ + i) & (items_.size() - 1)]; }

  std::vector<Thread*> items_;  // as many as a power of two
  size_t head_ = 0, size_ = 0;
};

}  // namespace gunn::emulator
