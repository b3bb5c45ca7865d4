// Runs kernels on buffers of exactly their size, for sanitizers.
//
//   driver [--threads] [--flush] < cases > results
//
// A case is a line "kernel, grid x y z, threads, threadgroup bytes, offset in
// bytes of the arrays from an aligned address, threadgroups to run at either
// end of the grid, number of buffers". Then each buffer follows in
// order: a line "size" and size bytes; or a line "-k" where it is the same as
// buffer k - 1; or a line "@path" for the bytes of a file, which the kernel
// writes to the file. Results are the bytes of the other buffers that the
// kernel writes. --threads runs each lane on an OS thread of its own (all cases
// have as many lanes), --flush takes denormals for zero.

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <memory>
#include <span>
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

struct Case {
  Launch launch;
  size_t most_groups;
  std::vector<std::span<char>> buffers; // empty where it is a file
  std::vector<std::unique_ptr<char[]>> memory;
};

void* map_file(const std::string& path) {
  int file = open(path.c_str(), O_RDWR);
  size_t size = std::filesystem::file_size(path);
  int protection = PROT_READ | PROT_WRITE;
  void* bytes = mmap(nullptr, size, protection, MAP_SHARED, file, 0);
  if (bytes == MAP_FAILED) {
    throw std::runtime_error("cannot map " + path);
  }
  return bytes;
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
  Case result{{find_kernel(name), {}, {1, 1, 1}, {}, 0}, 0, {}, {}};
  auto& launch = result.launch;
  size_t offset, count;
  std::cin >> launch.grid.x >> launch.grid.y >> launch.grid.z;
  std::cin >> launch.threads.x >> launch.threadgroup_bytes >> offset;
  std::cin >> result.most_groups >> count;
  if (!launch.kernel || !std::cin) {
    throw std::runtime_error("cannot run " + name);
  }
  for (size_t i = 0; i < count; ++i) {
    std::string size;
    std::cin >> size;
    auto& buffer = result.buffers.emplace_back();
    if (size[0] == '-') {
      size_t other = std::stoul(size.substr(1)) - 1;
      buffer = result.buffers[other];
      launch.buffers[i] = launch.buffers[other];
    } else if (size[0] == '@') {
      std::string rest; // of a path with spaces
      std::getline(std::cin, rest);
      launch.buffers[i] = map_file(size.substr(1) + rest);
    } else {
      // Not where it would break the alignment of one element.
      size_t before = element_size(launch, i) <= offset ? offset : 0;
      size_t count = std::stoul(size);
      auto& bytes = result.memory.emplace_back(new char[before + count]);
      buffer = {bytes.get() + before, count};
      launch.buffers[i] = buffer.data();
      std::cin.get(); // the end of the line
      std::cin.read(buffer.data(), count);
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
        const auto& buffer = c.buffers[argument.index];
        std::cout.write(buffer.data(), buffer.size());
      }
    }
  }
  return std::cout.flush() ? 0 : 1;
}
