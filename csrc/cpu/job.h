// Work that is cut into units for several threads.

#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>

#include "mlx/stream.h"

namespace mlx_adadelta {

namespace mx = mlx::core;

/**
 * Whoever has time takes a unit: the stream's own thread when it gets to the
 * job, and helper threads. Nobody waits for a helper that never came.
 */
class Job {
 public:
  virtual ~Job() = default;

  /** Runs a unit, on any thread and in any order. */
  virtual void run_unit(size_t unit) = 0;
  /** Called once, after the last unit. */
  virtual void finish() {}

  size_t units = 0;
  // How many threads beside the stream's own are worth their start.
  size_t helpers = 0;
  // Whether its inputs are there already: then helpers run ahead of the stream.
  bool ready = false;
  mx::Stream stream{0, mx::Device::cpu}; // dispatch() sets it

  void run(const std::shared_ptr<Job>& self);
  /** Takes a unit and runs it; false if none is left. */
  bool take_unit();
  /** Whether a unit is left. */
  bool has_units() const;
  void wait();
  /** Whether nobody had begun, and now nobody will. */
  bool cancel();

 private:
  std::atomic<size_t> next_{0};
  std::atomic<size_t> run_units_{0};
  std::atomic<bool> finished_{false};
};

/**
 * Runs a job on a stream. If that throws, nothing has begun, or all is done and
 * `after` was called.
 */
void dispatch(
    mx::Stream stream,
    const std::shared_ptr<Job>& job,
    const std::function<void()>& after);

// Of each thread's own memory.
constexpr size_t kScratch = 17 << 16;

/**
 * This thread's own memory, aligned to a cache line. Allocated at its first
 * use; every thread that runs units has it before.
 */
std::byte* scratch();

} // namespace mlx_adadelta
