// Numbers that travel between blocks of one launch as words: a value and the epoch it belongs to, in one 64-bit access.
//
// A reader polls until the epoch is the one it waits for. The value comes with it, so nothing needs to be ordered: no
// fence, no counter, no read-back of memory.
#pragma once

#include "cuda/launch.cuh"

namespace gunn {

using Word = unsigned long long;

GUNN_DEVICE void send(Word* word, float value, unsigned epoch) {
  store_relaxed(word, static_cast<Word>(epoch) << 32 | __float_as_uint(value));
}

GUNN_DEVICE float receive(const Word* word, unsigned epoch, const char* what) {
  Word seen = 0;
  poll(what, [&] {
    seen = load_relaxed(word);
    return static_cast<unsigned>(seen >> 32) == epoch;
  });
  return __uint_as_float(static_cast<unsigned>(seen));
}

}  // namespace gunn
