// The functions that lanes of a warp call together: the last lane to come works for all, then all go on.
#pragma once

#include <cstdint>
#include <list>

#include "emulator/primitives.h"

namespace gunn::emulator {

struct Thread;

enum class Operation { barrier, shuffle, gather, ballot, multiply };

// What one lane brings, and what it takes away.
struct Contribution {
  Operation operation;
  Format format = Format::bfloat16;
  unsigned source = 0;
  Slot slot{};
};

// A meeting of the lanes of one mask. Lanes with different masks meet apart, as Volta and its successors allow.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  unsigned phase = 0;  // barriers alternate between two tokens, or a late lane would acquire the next one's release
  const char* name = "";
  Contribution lanes[32];
  Thread* threads[32] = {};
  char tokens[2] = {};

  bool has(unsigned lane) const { return arrived >> lane & 1; }
};

class Warp {
 public:
  void add(unsigned lane) { alive_ |= 1u << lane; }
  void leave(unsigned lane) { alive_ &= ~(1u << lane); }  // its thread has ended: nobody waits for it any more
  unsigned alive() const { return alive_; }

  Meeting& at(unsigned mask);  // the meeting of this mask, or an idle one
  std::list<Meeting>& meetings() { return meetings_; }

 private:
  unsigned alive_ = 0;
  std::list<Meeting> meetings_;  // a list: each stays where it is
};

// Works for all that have come: what each takes away replaces what it brought.
void carry_out(Meeting& meeting);

// C = A · B on the fragments of a whole warp: slot words 0–3 hold A and 4–5 B, the product comes as words 0–3.
void multiply_fragments(Format format, Contribution (&lanes)[32]);

}  // namespace gunn::emulator
