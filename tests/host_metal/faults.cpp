// Fails every allocation of an evaluation in turn:
//   faults cpu|metal   the Metal path runs on the mock
//   faults errors      reports another task's error at each of them instead
//
// Prints, for each case, how many evaluations threw. A failed check ends the
// program.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <future>
#include <iostream>
#include <string>
#include <string_view>
#include <thread>

#include "group.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/memory.h"
#include "mlx/scheduler.h"

namespace {

// On this thread: how many allocations succeed before a fault; < 0: all.
thread_local long successes = -1;
thread_local bool one_failed = false;
// What happens in place of a failed allocation, if set.
void (*fault)() = nullptr;

bool fails(size_t) {
  if (successes < 0 || successes-- > 0) {
    return false;
  }
  one_failed = true;
  if (fault) {
    fault();
  }
  return !fault;
}

} // namespace

// One helper, whatever the machine.
unsigned int std::thread::hardware_concurrency() noexcept {
  return 2;
}

// The mock calls this at the first call to Metal. After it no allocation is
// made to fail.
extern "C" void host_metal_on_encoding() {
  successes = -1;
}

namespace {

// Every few dispatches MLX queues a second task that counts the first. Queueing
// the second may fail when the first is queued already. Leaves `ahead`
// dispatches before the next such pair.
void set_dispatches_ahead(Stream stream, int ahead) {
  auto& encoder = cpu::get_command_encoder(stream);
  std::atomic<bool> go{false};
  // Holds the stream, so that no task is counted as done.
  scheduler::enqueue(stream, [&go] { go.wait(false); });
  int active = scheduler::n_active_tasks();
  while (scheduler::n_active_tasks() == active) {
    encoder.dispatch([] {});
  }
  for (int i = ahead + 1; i < cpu::DISPATCHES_PER_TASK; ++i) {
    encoder.dispatch([] {});
  }
  go = true;
  go.notify_all();
  synchronize(stream);
}

// Lets an earlier task of the stream fail now. MLX reports it when this thread
// next queues a task or waits.
constexpr std::string_view kEarlier = "an earlier task";
std::shared_future<void> earlier_failed;

void fail_earlier_task() {
  auto failed = std::make_shared<std::promise<void>>();
  earlier_failed = failed->get_future();
  auto stream = default_stream(Device::cpu);
  // Another thread queues them, so that MLX has not reported it to this one.
  std::thread([failed, stream] {
    scheduler::enqueue(
        stream, [] { throw std::runtime_error(std::string(kEarlier)); });
    scheduler::enqueue(stream, [failed] { failed->set_value(); });
  }).detach();
  // Waits a limited time: the failing allocation may hold the queue's lock.
  earlier_failed.wait_for(std::chrono::milliseconds(100));
}

// Lets `run` raise std::bad_alloc or kEarlier; returns whether it did.
template <typename F>
bool throws(F run, int& reports) {
  try {
    run();
    return false;
  } catch (const std::bad_alloc&) {
    return true;
  } catch (const std::runtime_error& error) {
    require(error.what() == kEarlier, error.what());
    ++reports;
    return true;
  }
}

// Fails each allocation of an evaluation in turn, where MLX counts the dispatch
// after `ahead` others. Returns how many evaluations threw.
long check_faults(const Case& c, bool metal, int ahead) {
  auto stream = default_stream(Device::cpu);
  std::string expected;
  {
    Group group(c);
    group.evaluate(metal);
    synchronize(stream);
    expected = bytes(group.outputs);
  }
  auto& temporaries = cpu::get_command_encoder(stream).temporaries();
  temporaries.clear();
  auto resident = get_active_memory();
  long allocations = 0;
  long thrown = 0;
  for (one_failed = true; one_failed; ++allocations) {
    {
      Group group(c);
      auto inputs = group.inputs();
      int reports = 0;
      set_dispatches_ahead(stream, ahead);
      one_failed = false;
      successes = allocations;
      // Some code does without the memory: std::stable_sort, for one.
      bool threw = throws([&] { group.evaluate(metal); }, reports);
      successes = -1;
      if (earlier_failed.valid()) {
        earlier_failed.wait();
      }
      while (throws([&] { synchronize(stream); }, reports)) {
      }
      temporaries.clear();
      // After an error MLX leaves a task counted; ten of them block eval.
      while (scheduler::n_active_tasks() > 0) {
        scheduler::notify_task_completion(stream);
      }
      thrown += threw;
      require(reports == (one_failed && fault), c.name, ": an error is lost");
      const auto& outputs = group.outputs;
      bool done = std::any_of(outputs.begin(), outputs.end(), [](auto& out) {
        return out.inputs().empty();
      });
      require(done || threw, c.name, ": an error is lost");
      require(
          done || group.inputs() == inputs, c.name, ": something was written");
      // MLX evaluates again, for whatever output is asked for next.
      for (size_t i = 0; i < outputs.size(); ++i) {
        group.evaluate(metal, i);
        synchronize(stream);
        temporaries.clear();
      }
      require(
          bytes(group.outputs) == expected,
          c.name,
          ": wrong results after fault ",
          allocations);
    }
    require(get_active_memory() == resident, c.name, ": memory is lost");
  }
  return thrown;
}

void check_all_faults(bool metal) {
  mlx_adadelta::AdaDeltaOptions options;
  options.gradient_scale = array(0.5f);
  options.skip = array(false);
  const Case cases[] = {
      {"in-place", {9, 33}, kSame, kSame, kSame},
      {"large", {517, 523}, kSame, kSame, kSame},
      {"held", {9, 33}, kSame, kSame, kSame, true},
      {"transposed-gradient", {65, 33}, kSame, kTransposed, kSame},
      {"transposed-state", {65, 33}, kSame, kTransposed, kTransposed},
      {"sliced-gradient", {9, 33}, kSame, kSliced, kSame},
      {"sliced-parameter", {9, 33}, kSliced, kSame, kSliced},
      {"everything", {65, 33}, kSliced, kTransposed, kSliced, true, options},
  };
  for (const auto& c : cases) {
    long thrown = 0;
    for (int ahead = 0; ahead < cpu::DISPATCHES_PER_TASK; ++ahead) {
      thrown += check_faults(c, metal, ahead);
    }
    std::cout << c.name << ' ' << thrown << std::endl;
  }
}

} // namespace

int main(int, char** argv) {
  set_default_device(Device::cpu);
  set_cache_limit(0);
  std::string_view what = argv[1];
  if (what == "errors") {
    fault = fail_earlier_task;
  }
  check_all_faults(what == "metal");
}
