#include "job.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "mlx/backend/cpu/encoder.h"

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

// Threads that take units of the jobs that are offered, the oldest job first.
class Helpers {
 public:
  // Does without those that do not start.
  void offer(const std::shared_ptr<Job>& job) {
    if (job->helpers == 0) {
      return;
    }
    std::lock_guard lock(mutex_);
    try {
      // One by one, up to the number of cores less the stream's.
      while (threads_ < most_) {
        std::thread([this] { work(); }).detach();
        ++threads_;
      }
    } catch (const std::exception&) {
      // No memory or no more threads.
    }
    if (threads_ == 0) {
      return;
    }
    drop_begun();
    try {
      jobs_.push_back(job);
    } catch (const std::exception&) {
      return;
    }
    for (size_t i = std::min(threads_, job->helpers); i > 0; --i) {
      offered_.notify_one();
    }
  }

  // The oldest job with a unit left, if it is one of this stream.
  std::shared_ptr<Job> oldest(Stream stream) {
    std::lock_guard lock(mutex_);
    drop_begun();
    bool found = !jobs_.empty() && jobs_.front()->stream == stream;
    return found ? jobs_.front() : nullptr;
  }

 private:
  void work() {
    try {
      scratch();
    } catch (const std::exception&) {
      std::lock_guard lock(mutex_);
      --threads_;
      return;
    }
    for (;;) {
      std::unique_lock lock(mutex_);
      while (drop_begun(), jobs_.empty()) {
        offered_.wait(lock);
      }
      auto job = jobs_.front();
      lock.unlock();
      while (job->take_unit()) {
      }
    }
  }

  // Drops jobs of which every unit is taken.
  void drop_begun() {
    while (!jobs_.empty() && !jobs_.front()->has_units()) {
      jobs_.pop_front();
    }
  }

  // Asked once: the answer comes from a file.
  const size_t most_ = std::max(1u, std::thread::hardware_concurrency()) - 1;
  size_t threads_ = 0;
  std::deque<std::shared_ptr<Job>> jobs_;
  std::mutex mutex_;
  std::condition_variable offered_;
};

// Never destroyed: a stream may still run when static objects are.
Helpers& helper_threads() {
  static auto* helpers = new Helpers;
  return *helpers;
}

} // namespace

std::byte* scratch() {
  constexpr size_t line = 64;
  thread_local const std::unique_ptr<std::byte[]> memory(
      new std::byte[kScratch + line]);
  auto address = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + (line - address % line);
}

void Job::run(const std::shared_ptr<Job>& self) {
  try {
    scratch();
  } catch (const std::exception&) {
    if (cancel()) {
      throw;
    }
    wait(); // helpers have begun, and have their memory
    return;
  }
  if (!ready) {
    helper_threads().offer(self);
  }
  while (take_unit()) {
  }
  // Others run the last units: meanwhile this thread runs ahead, too.
  while (!finished_) {
    auto next = helper_threads().oldest(stream);
    if (!next || !next->take_unit()) {
      wait();
    }
  }
}

bool Job::take_unit() {
  size_t i = next_++;
  if (i >= units) {
    return false;
  }
  run_unit(i);
  if (++run_units_ == units) {
    finish();
    finished_ = true;
    finished_.notify_all();
  }
  return true;
}

bool Job::has_units() const {
  return next_ < units;
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
    Stream stream,
    const std::shared_ptr<Job>& job,
    const std::function<void()>& after) {
  if (job->units == 0) {
    job->finish();
    return;
  }
  job->stream = stream;
  try {
    if (job->ready) {
      helper_threads().offer(job);
    }
    cpu::get_command_encoder(stream).dispatch([job] { job->run(job); });
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
