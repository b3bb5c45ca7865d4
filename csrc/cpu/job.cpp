#include "job.h"

#include <algorithm>
#include <exception>
#include <thread>

#include "mlx/threadpool.h"

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

// How many threads there are beside the stream's own. Asked once: the answer
// comes from a file.
size_t most_helpers() {
  static const size_t cores = std::thread::hardware_concurrency();
  return std::max<size_t>(1, cores) - 1;
}

// Never joined: a stream may still run when static objects are destroyed.
ThreadPool& helper_threads() {
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

} // namespace

void Job::run(const std::shared_ptr<Job>& self) {
  prepare_thread(); // if it throws, nobody begins
  try {
    for (size_t i = std::min(most_helpers(), helpers); i > 0; --i) {
      helper_threads().enqueue([self] { self->take_units(); });
    }
  } catch (const std::exception&) {
    // No memory or no threads for more help: this thread does the rest.
  }
  take_units();
  wait();
}

void Job::take_units() {
  prepare_thread(); // if it throws, this thread takes none
  for (size_t i = next_++; i < units; i = next_++) {
    run_unit(i);
    if (++run_units_ == units) {
      finish();
      finished_ = true;
      finished_.notify_all();
    }
  }
}

void Job::wait() {
  finished_.wait(false);
}

bool Job::cancel() {
  size_t none = 0;
  if (!next_.compare_exchange_strong(none, units)) {
    return false;
  }
  finished_ = true;
  finished_.notify_all();
  return true;
}

void dispatch(
    cpu::CommandEncoder& encoder,
    const std::shared_ptr<Job>& job,
    const std::function<void()>& after) {
  if (job->units == 0) {
    job->finish();
    return;
  }
  try {
    encoder.dispatch([job] { job->run(job); });
  } catch (...) {
    // The task may be queued all the same: MLX counts some tasks with a second
    // one. Whatever has begun is finished while its arrays are held.
    if (!job->cancel()) {
      job->wait();
      after();
    }
    throw;
  }
}

} // namespace mlx_adadelta
