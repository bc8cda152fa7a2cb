// Pieces of the one workspace that the caller allocates for a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gunn {

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Hands out pieces of the caller's workspace; with no workspace it only counts the bytes.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {
    const auto address = reinterpret_cast<uintptr_t>(base);
    offset_ = base ? static_cast<int64_t>(round_up(address, kAlignment) - address) : kAlignment;
  }
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + offset_) : nullptr;
    offset_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return piece;
  }
  int64_t bytes() const { return offset_; }

 private:
  static constexpr int64_t kAlignment = 64;
  std::byte* base_;
  int64_t offset_;
};

}  // namespace gunn
