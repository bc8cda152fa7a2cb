// Numbers that travel between blocks of one launch as words: a value and the epoch it belongs to, in one 64-bit access.
//
// A reader polls until the epoch is the one it waits for. The value comes with it, so nothing needs to be ordered: no
// fence, no counter, no read-back of memory.
#pragma once

#include "cuda/launch.cuh"

namespace gunn {

using Word = unsigned long long;

GUNN_DEVICE void send_bits(Word* word, uint32_t bits, unsigned epoch) {
  store_relaxed(word, static_cast<Word>(epoch) << 32 | bits);
}
GUNN_DEVICE void send(Word* word, float value, unsigned epoch) { send_bits(word, __float_as_uint(value), epoch); }

// The values of the words at(0), at(1), …; where at() is null there is none, and 0. All are asked for at once: the way
// to memory and back is waited for once, not once a word.
template <int count, class At>
GUNN_DEVICE void receive(uint32_t (&values)[count], unsigned epoch, const char* what, const At& at) {
  Word seen[count];
  poll(what, [&] {
    bool all = true;
    GUNN_UNROLL
    for (int j = 0; j < count; ++j) {
      const Word* word = at(j);
      seen[j] = static_cast<Word>(epoch) << 32;
      if (word != nullptr) seen[j] = load_relaxed(word);
    }
    GUNN_UNROLL
    for (int j = 0; j < count; ++j) all = all && static_cast<unsigned>(seen[j] >> 32) == epoch;
    return all;
  });
  GUNN_UNROLL
  for (int j = 0; j < count; ++j) values[j] = static_cast<uint32_t>(seen[j]);
}

}  // namespace gunn
