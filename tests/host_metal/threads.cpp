// Threads that get no memory, or do not start:
//   threads memory   fails the memory of each kind of thread
//   threads ahead    lets helpers run ahead of a stream that waits
//   threads N        lets the system start only N more threads
//
// A failed check ends the program.

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <string>
#include <string_view>
#include <thread>

#include "group.h"
#include "mlx/scheduler.h"

namespace {

// Whether large allocations fail on these threads.
std::atomic<bool> starve_stream{false};
std::atomic<bool> starve_helpers{false};
std::atomic<bool> helper_failed{false};
thread_local bool is_main = false;
thread_local bool is_stream = false;
constexpr size_t kLarge = 1 << 16;
// Cores that the system reports.
int cores = 2;
// Threads that the system still starts; < 0: any number.
std::atomic<int> threads_left{-1};

bool fails(size_t size) {
  if (size < kLarge || is_main) {
    return false;
  }
  if (is_stream) {
    // Waits for a helper to fail first, long enough for a busy machine.
    for (int i = 0; i < 10000 && starve_helpers && !helper_failed; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return starve_stream;
  }
  // Asked once: the stream may go on, and end this, as soon as one has failed.
  bool starved = starve_helpers;
  helper_failed = helper_failed || starved;
  return starved;
}

} // namespace

unsigned int std::thread::hardware_concurrency() noexcept {
  return cores;
}

extern "C" __attribute__((visibility("default"))) int pthread_create(
    pthread_t* thread,
    const pthread_attr_t* attributes,
    void* (*run)(void*),
    void* argument) {
  static auto* create =
      reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, __func__));
  if (threads_left == 0) {
    return EAGAIN;
  }
  threads_left -= threads_left > 0;
  return create(thread, attributes, run, argument);
}

namespace {

// A new stream is a new thread, which has no memory yet.
Stream use_new_stream() {
  auto stream = new_stream(Device::cpu);
  set_default_stream(stream);
  scheduler::enqueue(stream, [] { is_stream = true; });
  return stream;
}

const Case kCase{"helpers", {1031, 523}, kSame, kTransposed, kSame};

std::string expected_results() {
  Group group(kCase);
  group.evaluate(true);
  synchronize(default_stream(Device::cpu));
  return bytes(group.outputs);
}

// Threads allocate memory of their own at first use. Lets that fail: first the
// helpers', then the stream's where there are no helpers.
void check_memory() {
  auto expected = expected_results();
  for (auto* starved : {&starve_helpers, &starve_stream}) {
    auto stream = use_new_stream();
    Group group(kCase);
    synchronize(stream);
    auto inputs = group.inputs();
    *starved = true;
    threads_left = starved == &starve_stream ? 0 : -1;
    group.evaluate(false);
    bool failed = false;
    try {
      synchronize(stream);
    } catch (const std::runtime_error& error) { // as MLX hands it on
      failed = error.what() == std::string_view("std::bad_alloc");
    }
    *starved = false;
    threads_left = -1;
    require(
        failed == (starved == &starve_stream), "an error was lost or invented");
    require(
        failed ? group.inputs() == inputs : bytes(group.outputs) == expected,
        "wrong without helpers");
  }
}

// Holds a stream that got a group. Helpers finish the group ahead of it; then
// the stream's thread gets no memory, and needs none.
void check_ahead() {
  auto expected = expected_results();
  auto stream = use_new_stream();
  Group group(kCase);
  synchronize(stream);
  std::atomic<bool> go{false};
  scheduler::enqueue(stream, [&go] { go.wait(false); });
  group.evaluate(false);
  for (int i = 0; i < 10000 && bytes(group.outputs) != expected; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  require(bytes(group.outputs) == expected, "no helper ran ahead");
  starve_stream = true;
  go = true;
  go.notify_all();
  synchronize(stream);
}

// The system starts some of the pool's threads, or none.
void check_started(int count) {
  auto expected = expected_results();
  auto stream = default_stream(Device::cpu);
  Group group(kCase);
  cores = 6;
  threads_left = count;
  group.evaluate(false);
  synchronize(stream);
  require(threads_left == 0, "the pool did not want them all");
  require(bytes(group.outputs) == expected, "wrong results");
}

} // namespace

int main(int, char** argv) {
  is_main = true;
  set_default_device(Device::cpu);
  std::string_view what = argv[1];
  if (what == "memory") {
    check_memory();
  } else if (what == "ahead") {
    check_ahead();
  } else {
    check_started(std::atoi(argv[1]));
  }
}
