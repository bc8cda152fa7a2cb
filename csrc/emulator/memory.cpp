#include "emulator/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "emulator/sanitizers.h"

namespace gunn::emulator {

void* SharedMemory::add(const void* key, size_t bytes) {
  const Unwatched unwatched;
  void* begin = nullptr;
  if (posix_memalign(&begin, 128, bytes) != 0) throw std::bad_alloc();
  std::memset(begin, kUnwritten, bytes);
  arrays_.push_back({key, static_cast<char*>(begin), bytes});
  return begin;
}

void* SharedMemory::array(const void* key, size_t bytes) {
  for (const Array& array : arrays_) {
    if (array.key == key) return array.begin;
  }
  return add(key, bytes);
}

void SharedMemory::make_dynamic(size_t bytes) { dynamic_ = bytes == 0 ? nullptr : add(this, bytes); }

void SharedMemory::clear() {
  const Unwatched unwatched;
  for (const Array& array : arrays_) std::free(array.begin);
  arrays_.clear();
  dynamic_ = nullptr;
}

const SharedMemory::Array* SharedMemory::find(const void* place) const {
  for (const Array& array : arrays_) {
    if (place >= array.begin && place < array.begin + array.bytes) return &array;
  }
  return nullptr;
}

void* SharedMemory::same_place(const void* mine, SharedMemory& other) const {
  const Array* array = find(mine);
  if (!array) return nullptr;
  char* theirs = static_cast<char*>(array->begin == dynamic_ ? other.dynamic_ : other.array(array->key, array->bytes));
  return theirs + (static_cast<const char*>(mine) - array->begin);
}

bool SharedMemory::contains(const void* begin, size_t bytes) const {
  const Array* array = find(begin);
  return array && static_cast<const char*>(begin) + bytes <= array->begin + array->bytes;
}

size_t SharedMemory::bytes() const {
  size_t sum = 0;
  for (const Array& array : arrays_) sum += array.bytes;
  return sum;
}

// The sanitizers watch memset and memcpy also where, as here, they are called from code they do not know.
void Copies::add(void* to, const void* from, unsigned bytes) {
  std::memset(to, SharedMemory::kUnwritten, bytes);
  const Unwatched unwatched;
  copies_.push_back({to, from, bytes, open_});
}

void Copies::wait(unsigned pending) {
  size_t landed = 0;
  while (landed < copies_.size() && copies_[landed].group + pending < open_) {
    const Copy& copy = copies_[landed++];
    if (copy.from) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  const Unwatched unwatched;
  copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(landed));
}

void Copies::clear() {
  copies_.clear();
  open_ = 0;
}

}  // namespace gunn::emulator
