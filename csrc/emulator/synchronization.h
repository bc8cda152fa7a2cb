// CUDA's names for barriers, votes and shuffles.
#pragma once

#include <type_traits>

#include "emulator/primitives.h"

inline void __syncthreads(gunn::emulator::Site site = gunn::emulator::Site::here()) {
  gunn::emulator::block_barrier("__syncthreads", false, site);
}
inline int __syncthreads_count(int vote, gunn::emulator::Site site = gunn::emulator::Site::here()) {
  return static_cast<int>(gunn::emulator::block_barrier("__syncthreads_count", vote != 0, site).yes);
}
inline int __syncthreads_or(int vote, gunn::emulator::Site site = gunn::emulator::Site::here()) {
  return gunn::emulator::block_barrier("__syncthreads_or", vote != 0, site).yes != 0;
}
inline int __syncthreads_and(int vote, gunn::emulator::Site site = gunn::emulator::Site::here()) {
  const gunn::emulator::Votes votes = gunn::emulator::block_barrier("__syncthreads_and", vote != 0, site);
  return votes.yes == votes.all;
}

inline void __syncwarp(unsigned mask = ~0u, gunn::emulator::Site site = gunn::emulator::Site::here()) {
  gunn::emulator::warp_barrier(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int vote, gunn::emulator::Site site = gunn::emulator::Site::here()) {
  return gunn::emulator::ballot("__ballot_sync", mask, vote != 0, site);
}
inline int __any_sync(unsigned mask, int vote, gunn::emulator::Site site = gunn::emulator::Site::here()) {
  return gunn::emulator::ballot("__any_sync", mask, vote != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int vote, gunn::emulator::Site site = gunn::emulator::Site::here()) {
  return gunn::emulator::ballot("__all_sync", mask, vote == 0, site) == 0;
}

namespace gunn::emulator {

template <class T>
T shuffle_value(const char* name, unsigned mask, const T& value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4- or 8-byte numbers");
  Slot slot{};
  std::memcpy(&slot, &value, sizeof value);
  slot = shuffle(name, mask, slot, source, site);
  T result;
  std::memcpy(&result, &slot, sizeof result);
  return result;
}

}  // namespace gunn::emulator

// A lane whose source lies outside its segment of `width` lanes reads itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              gunn::emulator::Site site = gunn::emulator::Site::here()) {
  const unsigned lane = gunn::emulator::lane(), within = static_cast<unsigned>(width) - 1;
  const unsigned from = (lane & ~within) | (static_cast<unsigned>(source) & within);
  return gunn::emulator::shuffle_value("__shfl_sync", mask, value, from, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  gunn::emulator::Site site = gunn::emulator::Site::here()) {
  const unsigned lane = gunn::emulator::lane(), from = lane ^ static_cast<unsigned>(bits);
  const bool later_segment = from / static_cast<unsigned>(width) > lane / static_cast<unsigned>(width);
  return gunn::emulator::shuffle_value("__shfl_xor_sync", mask, value, later_segment ? lane : from, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   gunn::emulator::Site site = gunn::emulator::Site::here()) {
  const unsigned lane = gunn::emulator::lane(), segment = static_cast<unsigned>(width);
  const unsigned from = lane % segment + delta < segment ? lane + delta : lane;
  return gunn::emulator::shuffle_value("__shfl_down_sync", mask, value, from, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 gunn::emulator::Site site = gunn::emulator::Site::here()) {
  const unsigned lane = gunn::emulator::lane(), segment = static_cast<unsigned>(width);
  const unsigned from = lane % segment >= delta ? lane - delta : lane;
  return gunn::emulator::shuffle_value("__shfl_up_sync", mask, value, from, site);
}

// Orders nothing for the race detector, as CUDA's fences order nothing without an atomic beside them: pass a value
// between blocks with store_release and load_acquire.
inline void __threadfence() { gunn::emulator::fence(); }
inline void __threadfence_block() { gunn::emulator::fence(); }
