// A group of parameters' updates, cut into units for several threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "mlx/threadpool.h"
#include "strips.h"

namespace mlx_adadelta {

namespace {

// Below this many elements a second thread costs more than it saves.
constexpr size_t kParallel = 1 << 17;

// One parameter's update. Its units may run in any order.
struct Work {
  Elements elements;
  size_t size;
  AdaDeltaTile tile; // of a transposed gradient; no rows: it lies as w does
  AdaDeltaParams params;
  // Read when the stream gets there.
  const float* lr;
  const float* gradient_scale;
  const bool* skip;
  const uint64_t* step;
  size_t units = 0;

  Scalars scalars() const {
    RandomKeys keys{};
    if (params.stochastic != 0) {
      keys = adadelta_keys(*step, params);
    }
    return {*lr, *gradient_scale, *skip, params, keys};
  }
};

void run_unit(const Work& work, size_t unit);

// How many threads there are beside the stream's own. Asked once: the answer
// comes from a file.
size_t most_helpers() {
  static const size_t cores = std::thread::hardware_concurrency();
  return std::max<size_t>(1, cores) - 1;
}

// Never joined: a stream may still run when static objects are destroyed.
ThreadPool& helpers() {
  static auto* pool = [] {
    auto some = std::make_unique<ThreadPool>(0);
    // One by one: a thread that does not start leaves the others. In the pool's
    // constructor it would end the process.
    for (size_t i = 1; i <= most_helpers(); ++i) {
      try {
        some->resize(i);
      } catch (const std::exception&) {
        if (i == 1) {
          throw;
        }
        break;
      }
    }
    return some.release();
  }();
  return *pool;
}

// Whoever has time takes a unit. Nobody waits for a helper that never came: it
// may be busy with another stream's group.
struct Job {
  void add(Work work) {
    size += work.size;
    units += work.units;
    group.push_back(std::move(work));
  }

  void take_units() {
    strip_buffer(); // may throw: before any unit is taken
    auto work = group.begin();
    size_t first = 0; // the number of work's first unit
    for (size_t i = next++; i < units; i = next++) {
      while (i - first >= work->units) {
        first += work->units;
        ++work;
      }
      run_unit(*work, i - first);
      if (++finished == units) {
        finished.notify_all();
      }
    }
  }

  void wait() {
    for (size_t i = finished; i != units; i = finished) {
      finished.wait(i);
    }
  }

  // Whether nobody had begun, and now nobody will.
  bool cancel() {
    size_t none = 0;
    if (!next.compare_exchange_strong(none, units)) {
      return false;
    }
    finished = units;
    finished.notify_all();
    return true;
  }

  std::vector<Work> group;
  size_t size = 0;
  size_t units = 0;
  std::atomic<size_t> next{0};
  std::atomic<size_t> finished{0};
};

void run(const std::shared_ptr<Job>& job) {
  strip_buffer(); // may throw: then nobody begins
  size_t useful = job->size / kParallel;
  try {
    for (size_t i = std::min(most_helpers(), useful); i > 0; --i) {
      helpers().enqueue([job] { job->take_units(); });
    }
  } catch (const std::exception&) {
    // No memory or no threads for more help: this thread does the rest.
  }
  job->take_units();
  job->wait();
}

} // namespace

} // namespace mlx_adadelta
