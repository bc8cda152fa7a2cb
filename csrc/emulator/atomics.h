// Atomic functions, relaxed as CUDA's are, on any 4- or 8-byte type; and loads and stores with a memory order.
//
// They are compiled with the kernel, so that the race detector sees them. Under a seed each may let another thread go
// first: an order of updates that is not fixed shows as bits that change.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "emulator/primitives.h"

namespace gunn::emulator {

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <class T>
Bits<T>* bits_of(const T* p) {
  static_assert((sizeof(T) == 4 || sizeof(T) == 8) && std::is_trivially_copyable_v<T>, "atomics move 4 or 8 bytes");
  return reinterpret_cast<Bits<T>*>(const_cast<T*>(p));
}

template <int Order, class T, class Function>
T atomic_update(T* p, Function next) {
  interleave();
  Bits<T> old = __atomic_load_n(bits_of(p), __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits_of(p), &old, bit_cast<Bits<T>>(next(bit_cast<T>(old))), true, Order,
                                      __ATOMIC_RELAXED)) {
  }
  return bit_cast<T>(old);
}

template <int Order, class T>
T atomic_load(const T* p) {
  return bit_cast<T>(__atomic_load_n(bits_of(p), Order));
}
template <int Order, class T>
void atomic_store(T* p, T value) {
  interleave();
  __atomic_store_n(bits_of(p), bit_cast<Bits<T>>(value), Order);
}

template <class T>
struct Same {
  using type = T;
};
template <class T>
using Value = typename Same<T>::type;  // takes no part in deduction: atomicAdd(float*, 1) adds a float

}  // namespace gunn::emulator

#define GUNN_ATOMIC(name, expression)                                                                      \
  template <class T>                                                                                       \
  T name(T* p, gunn::emulator::Value<T> value) {                                                           \
    return gunn::emulator::atomic_update<__ATOMIC_RELAXED>(p, [value](T old) -> T { return expression; }); \
  }
GUNN_ATOMIC(atomicAdd, old + value)
GUNN_ATOMIC(atomicSub, old - value)
GUNN_ATOMIC(atomicMin, std::min(old, value))
GUNN_ATOMIC(atomicMax, std::max(old, value))
GUNN_ATOMIC(atomicAnd, old& value)
GUNN_ATOMIC(atomicOr, old | value)
GUNN_ATOMIC(atomicXor, old ^ value)
GUNN_ATOMIC(atomicExch, (static_cast<void>(old), value))
#undef GUNN_ATOMIC

template <class T>
T atomicCAS(T* p, gunn::emulator::Value<T> expected, gunn::emulator::Value<T> value) {
  return gunn::emulator::atomic_update<__ATOMIC_RELAXED>(p, [=](T old) -> T { return old == expected ? value : old; });
}
