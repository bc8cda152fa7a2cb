#include "emulator/report.h"

#include <cstdio>
#include <cstring>
#include <sstream>

namespace gunn::emulator {
namespace {

constexpr int kMostLines = 12, kMostRanges = 6;

std::string name_of(const Block& block) {
  std::ostringstream text;
  text << "block (" << block.index.x << ", " << block.index.y << ", " << block.index.z << ")";
  return text.str();
}

bool same_place(const Thread& a, const Thread& b) {
  return a.home == b.home && a.ended == b.ended && a.waits_at == b.waits_at && !(a.site != b.site);
}

// "0–31, 40, 64–95 (65)"
std::string numbers(const std::vector<const Thread*>& threads) {
  std::ostringstream text;
  int ranges = 0;
  for (size_t i = 0; i < threads.size();) {
    size_t j = i + 1;
    while (j < threads.size() && threads[j]->number == threads[j - 1]->number + 1) ++j;
    if (ranges++ == kMostRanges) {
      text << ", …";
      break;
    }
    text << (i == 0 ? "" : ", ") << threads[i]->number;
    if (j > i + 1) text << "–" << threads[j - 1]->number;
    i = j;
  }
  if (threads.size() > 1) text << " (" << threads.size() << ")";
  return text.str();
}

}  // namespace

std::string name_of(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string name_of(const Thread& thread) {
  return name_of(*thread.home) + ", thread " + std::to_string(thread.number);
}

std::string name_of_mask(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

std::string describe_waiting(const std::vector<Thread>& threads) {
  std::ostringstream text;
  std::vector<bool> told(threads.size(), false);
  int lines = 0;
  for (size_t i = 0; i < threads.size(); ++i) {
    if (told[i]) continue;
    const Thread& first = threads[i];
    std::vector<const Thread*> group;
    for (size_t j = i; j < threads.size() && threads[j].home == first.home; ++j) {
      if (!same_place(first, threads[j])) continue;
      told[j] = true;
      group.push_back(&threads[j]);
    }
    if (lines++ >= kMostLines) continue;
    text << "\n  " << name_of(*first.home) << (group.size() > 1 ? ", threads " : ", thread ") << numbers(group);
    if (first.ended) {
      text << ": ended";
    } else {
      text << (first.polls ? ": poll for " : ": wait at ") << first.waits_at << " (" << name_of(first.site) << ")";
    }
  }
  if (lines > kMostLines) text << "\n  and " << lines - kMostLines << " groups more";
  return text.str();
}

}  // namespace gunn::emulator
