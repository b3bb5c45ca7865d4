// Runs kernels on buffers of exactly their size, for sanitizers.
//
//   driver [--threads] [--flush] < cases > results
//
// A case is a line "kernel, grid x y z, threads x y z, threadgroup bytes,
// offset in bytes of the arrays from an aligned address, threadgroups to run at
// either end of the grid, number of buffers". Then each buffer follows in
// order: a line "size" and size bytes; or a line "-k" where it is the same as
// buffer k - 1; or a line "sparse size n" for one that is memory only in n
// windows, each a line "offset size" and size bytes. Results are the bytes of
// the buffers that the kernel writes. --threads runs each lane on an OS thread
// of its own (all cases have as many lanes), --flush takes denormals for zero.

#include <sys/mman.h>

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

struct Window {
  char* begin;
  size_t size;

  void read() const {
    std::cin.get(); // the end of the line
    std::cin.read(begin, size);
  }
};

struct Case {
  Launch launch;
  size_t most_groups;
  std::vector<std::vector<Window>> buffers;
  std::vector<std::unique_ptr<char[]>> memory;
};

// Address space that faults wherever it is not a window's page.
std::vector<Window> read_windows(void*& buffer) {
  constexpr size_t page = 4096;
  size_t size, count;
  std::cin >> size >> count;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  buffer = mmap(nullptr, size, PROT_NONE, flags, -1, 0);
  if (buffer == MAP_FAILED) {
    throw std::runtime_error("no address space");
  }
  std::vector<Window> windows(count);
  for (auto& window : windows) {
    size_t offset;
    std::cin >> offset >> window.size;
    window.begin = static_cast<char*>(buffer) + offset;
    size_t before = offset % page;
    auto* pages = window.begin - before;
    if (mprotect(pages, before + window.size, PROT_READ | PROT_WRITE) != 0) {
      throw std::runtime_error("no memory");
    }
    window.read();
  }
  return windows;
}

size_t element_size(const Launch& launch, size_t index) {
  for (const auto& argument : launch.kernel->arguments) {
    if (argument.index == index && argument.kind != Argument::kThreadgroup) {
      return argument.size;
    }
  }
  throw std::runtime_error("the kernel binds fewer buffers");
}

// Reads what follows a kernel's name.
Case read_case(const std::string& name) {
  Case result{{find_kernel(name), {}, {}, {}, 0}, 0, {}, {}};
  auto& launch = result.launch;
  size_t offset, count;
  std::cin >> launch.grid.x >> launch.grid.y >> launch.grid.z;
  std::cin >> launch.threads.x >> launch.threads.y >> launch.threads.z;
  std::cin >> launch.threadgroup_bytes >> offset >> result.most_groups >> count;
  if (!launch.kernel || !std::cin) {
    throw std::runtime_error("cannot run " + name);
  }
  for (size_t i = 0; i < count; ++i) {
    std::string size;
    std::cin >> size;
    auto& windows = result.buffers.emplace_back();
    if (size[0] == '-') {
      size_t other = std::stoul(size.substr(1)) - 1;
      windows = result.buffers[other];
      launch.buffers[i] = launch.buffers[other];
    } else if (size == "sparse") {
      windows = read_windows(launch.buffers[i]);
    } else {
      // Not where it would break the alignment of one element.
      size_t before = element_size(launch, i) <= offset ? offset : 0;
      auto& bytes =
          result.memory.emplace_back(new char[before + std::stoul(size)]);
      launch.buffers[i] = bytes.get() + before;
      windows = {{bytes.get() + before, std::stoul(size)}};
      windows[0].read();
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
    for (const auto& c : cases) {
      run_with_fibers(c.launch, c.most_groups);
    }
  }
  for (const auto& c : cases) {
    for (const auto& argument : c.launch.kernel->arguments) {
      if (argument.kind == Argument::kArray && argument.writable) {
        for (const auto& window : c.buffers[argument.index]) {
          std::cout.write(window.begin, window.size);
        }
      }
    }
  }
  return std::cout.flush() ? 0 : 1;
}
