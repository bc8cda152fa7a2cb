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
GUNN_DEVICE uint32_t receive_bits(const Word* word, unsigned epoch, const char* what) {
  Word seen = 0;
  poll(what, [&] {
    seen = load_relaxed(word);
    return static_cast<unsigned>(seen >> 32) == epoch;
  });
  return static_cast<uint32_t>(seen);
}
GUNN_DEVICE void send(Word* word, float value, unsigned epoch) { send_bits(word, __float_as_uint(value), epoch); }
GUNN_DEVICE float receive(const Word* word, unsigned epoch, const char* what) {
  return __uint_as_float(receive_bits(word, epoch, what));
}

}  // namespace gunn
