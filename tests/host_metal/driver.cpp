// Runs kernels on buffers of exactly their size, for sanitizers.
//
//   driver [--threads] [--flush] < cases > results
//
// A case is a line "kernel, grid x y z, threads x y z, threadgroup bytes,
// offset of the arrays from where vectors may lie, number of buffers", then
// for each buffer in order a line "size" and size
// bytes, or a line "-k" where it is the same as buffer k - 1. Results are the
// bytes of the buffers that the kernel writes. --threads gives every lane (as
// many in each case) an OS thread, --flush takes denormals for zero.

#include <algorithm>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "executor.h"

namespace {

using namespace host_metal;

void flush_denormals() {
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040); // FTZ and DAZ; new threads inherit it
#elif defined(__aarch64__)
  uint64_t fpcr;
  asm volatile("mrs %0, fpcr" : "=r"(fpcr));
  asm volatile("msr fpcr, %0" ::"r"(fpcr | (1 << 24)));
#else
#error "how does this machine flush denormals?"
#endif
}

constexpr size_t kArrays = 7; // buffers before those of one value

struct Case {
  Launch launch;
  std::vector<size_t> sizes;
  std::vector<std::unique_ptr<char[]>> memory;
};

// Reads what follows a kernel's name.
Case read_case(const std::string& name) {
  Case result{{find_kernel(name), {}, {}, {}, 0}, {}, {}};
  auto& launch = result.launch;
  size_t offset, count;
  std::cin >> launch.grid.x >> launch.grid.y >> launch.grid.z;
  std::cin >> launch.threads.x >> launch.threads.y >> launch.threads.z;
  std::cin >> launch.threadgroup_bytes >> offset >> count;
  if (!launch.kernel || !std::cin) {
    throw std::runtime_error("cannot run " + name);
  }
  for (size_t i = 0; i < count; ++i) {
    long size;
    std::cin >> size;
    std::cin.get();
    if (size < 0) {
      size_t other = -size - 1;
      result.sizes.push_back(result.sizes[other]);
      launch.buffers[i] = launch.buffers[other];
    } else {
      result.sizes.push_back(size);
      size_t before = i < kArrays ? offset : 0;
      auto& bytes = result.memory.emplace_back(new char[before + size]);
      launch.buffers[i] = bytes.get() + before;
      std::cin.read(bytes.get() + before, size);
    }
  }
  return result;
}

} // namespace

int main(int argc, char** argv) {
  auto has_option = [&](const char* name) {
    return std::find(argv, argv + argc, std::string_view(name)) != argv + argc;
  };
  if (has_option("--flush")) {
    flush_denormals();
  }
  std::vector<Case> cases;
  std::vector<Launch> launches;
  for (std::string name; std::cin >> name;) {
    launches.push_back(cases.emplace_back(read_case(name)).launch);
  }
  if (has_option("--threads")) {
    run_with_threads(launches, launches.at(0).threads.count());
  } else {
    for (const auto& launch : launches) {
      run_with_fibers(launch);
    }
  }
  for (const auto& c : cases) {
    for (const auto& argument : c.launch.kernel->arguments) {
      if (argument.kind == Argument::kArray && argument.writable) {
        auto* bytes = static_cast<char*>(c.launch.buffers[argument.index]);
        std::cout.write(bytes, c.sizes[argument.index]);
      }
    }
  }
  return std::cout.flush() ? 0 : 1;
}
