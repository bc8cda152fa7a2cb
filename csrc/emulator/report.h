// Texts of the emulator's errors.
#pragma once

#include <string>
#include <vector>

#include "emulator/team.h"

namespace gunn::emulator {

std::string name_of(Site site);             // "reduce.cu:41"
std::string name_of(const Thread& thread);  // "block (0, 0, 0), thread 5"
std::string name_of_mask(unsigned mask);    // "0x0000ffff"

// Who waits where, and who has ended: a line for each block and place.
std::string describe_waiting(const std::vector<Thread>& threads);

}  // namespace gunn::emulator
