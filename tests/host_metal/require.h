// How the tests in C++ check: a failed check ends the program.

#pragma once

#include <cstdlib>
#include <iostream>

namespace {

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) {
    (std::cerr << ... << parts) << std::endl;
    std::abort();
  }
}

} // namespace
