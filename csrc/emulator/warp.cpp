#include "emulator/warp.h"

#include "emulator/sanitizers.h"

namespace gunn::emulator {
namespace {

// Only lanes that have come are written: the others may not have fetched what they got from an earlier meeting here.
void carry_out_shuffle(Meeting& meeting) {
  Slot taken[32];
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (meeting.has(lane)) taken[lane] = meeting.lanes[meeting.lanes[lane].source].slot;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (meeting.has(lane)) meeting.lanes[lane].slot = taken[lane];
  }
}

// Each lane takes the first two words of four lanes, whose numbers are the bytes of its source.
void carry_out_gather(Meeting& meeting) {
  Slot taken[32];
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned j = 0; j < 4; ++j) {
      const Slot& from = meeting.lanes[meeting.lanes[lane].source >> 8 * j & 31].slot;
      taken[lane].words[2 * j] = from.words[0], taken[lane].words[2 * j + 1] = from.words[1];
    }
  }
  for (unsigned lane = 0; lane < 32; ++lane) meeting.lanes[lane].slot = taken[lane];
}

void carry_out_ballot(Meeting& meeting) {
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (meeting.has(lane)) votes |= (meeting.lanes[lane].slot.words[0] & 1) << lane;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (meeting.has(lane)) meeting.lanes[lane].slot.words[0] = votes;
  }
}

}  // namespace

Meeting& Warp::at(unsigned mask) {
  Meeting* idle = nullptr;
  for (Meeting& meeting : meetings_) {
    if (meeting.mask == mask) return meeting;
    if (meeting.arrived == 0) idle = &meeting;
  }
  if (!idle) {
    const Unwatched unwatched;
    idle = &meetings_.emplace_back();
  }
  idle->mask = mask;
  return *idle;
}

void carry_out(Meeting& meeting) {
  switch (meeting.lanes[__builtin_ctz(meeting.arrived)].operation) {
    case Operation::barrier:
      return;
    case Operation::shuffle:
      return carry_out_shuffle(meeting);
    case Operation::gather:
      return carry_out_gather(meeting);
    case Operation::ballot:
      return carry_out_ballot(meeting);
    case Operation::multiply:
      return multiply_fragments(meeting.lanes[0].format, meeting.lanes);
  }
}

}  // namespace gunn::emulator
