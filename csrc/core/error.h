// Errors are exceptions whose text names the value that is wrong, what was expected and the next step.
#pragma once

#include <sstream>
#include <stdexcept>

namespace gunn {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace gunn
