// Runs the kernels of metal/ on the host.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace host_metal {

struct Size {
  uint32_t x, y, z;

  size_t count() const {
    return static_cast<size_t>(x) * y * z;
  }
};

using Buffers = std::array<void*, 31>;

/** What one thread of a grid sees. The sizes have the names of Metal's
 * attributes. */
struct Lane {
  Buffers buffers;
  void* threadgroup_memory;
  Size threads_per_threadgroup;
  Size threadgroups_per_grid;
  Size threadgroup_position_in_grid;
  Size thread_position_in_threadgroup;
};

struct Argument {
  enum Kind { kArray, kBytes, kThreadgroup };

  const char* name;
  const char* type;
  size_t size; // of the type
  Kind kind;
  size_t index;
  bool writable;
};

struct Kernel {
  std::string name;
  std::vector<Argument> arguments; // those that are bound
  void (*run)(const Lane&);
};

/** The entry point of metal/ with that name, or null. */
const Kernel* find_kernel(const std::string& name);

struct Launch {
  const Kernel* kernel;
  Size grid; // in threadgroups
  Size threads; // of a threadgroup
  Buffers buffers;
  size_t threadgroup_bytes;
};

/** Runs every threadgroup, or so many at either end of the grid, each on
 * threadgroup memory full of NaN. Throws if a lane returns while others wait at
 * a barrier. */
void run_with_fibers(const Launch& launch, size_t most_groups = -1);

/** The same with an OS thread for each of so many lanes; a throw ends all. */
void run_with_threads(const std::vector<Launch>& launches, size_t lanes);

/** metal::threadgroup_barrier. */
void wait_at_barrier();

} // namespace host_metal
