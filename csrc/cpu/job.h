// Work that is cut into units for several threads.

#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>

#include "mlx/backend/cpu/encoder.h"

namespace mlx_adadelta {

namespace mx = mlx::core;

/**
 * Whoever has time takes a unit. Nobody waits for a helper that never came: it
 * may be busy with another stream's job.
 */
class Job {
 public:
  virtual ~Job() = default;

  /** Runs a unit, on any thread and in any order. */
  virtual void run_unit(size_t unit) = 0;
  /** Called once, after the last unit. */
  virtual void finish() {}
  /** Called on each thread before any unit; may throw. */
  virtual void prepare_thread() {}

  size_t units = 0;
  // How many threads beside the stream's own are worth their start.
  size_t helpers = 0;

  void run(const std::shared_ptr<Job>& self);
  void wait();
  /** Whether nobody had begun, and now nobody will. */
  bool cancel();

 private:
  void take_units();

  std::atomic<size_t> next_{0};
  std::atomic<size_t> run_units_{0};
  std::atomic<bool> finished_{false};
};

/**
 * Runs a job on a stream. If that throws, nothing has begun, or all is done and
 * `after` was called.
 */
void dispatch(
    mx::cpu::CommandEncoder& encoder,
    const std::shared_ptr<Job>& job,
    const std::function<void()>& after);

} // namespace mlx_adadelta
