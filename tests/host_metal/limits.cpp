// Tests of the extension's C++ that Python cannot express. The Metal path runs
// on the mock.
//
//   limits faults cpu|metal    fails every allocation of an evaluation in turn
//   limits errors              reports another task's error at each of them
//   limits helpers             fails the memory of each kind of thread
//   limits ahead               lets helpers run ahead of a stream that waits
//   limits threads N           lets the system start only N more threads
//   limits refusals            gives C++'s interface wrong arguments
//
// The first two print, for each case, how many evaluations threw. A failed
// check ends the program.

#include <dlfcn.h>
#include <pthread.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <future>
#include <iostream>
#include <new>
#include <string>
#include <string_view>
#include <thread>

#include "adadelta.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/memory.h"
#include "mlx/mlx.h"
#include "mlx/scheduler.h"
#include "require.h"

using namespace mlx::core;

// ------------------------------- Allocations --------------------------------

namespace {

// On this thread: how many allocations succeed before a fault; < 0: all.
thread_local long successes = -1;
thread_local bool one_failed = false;
// What happens in place of a failed allocation, if set.
void (*fault)() = nullptr;
// Whether large allocations fail on other threads.
std::atomic<bool> starve_stream{false};
std::atomic<bool> starve_helpers{false};
std::atomic<bool> helper_failed{false};
thread_local bool is_main = false;
thread_local bool is_stream = false;
constexpr size_t kLarge = 1 << 16;
// Cores that the system reports; 0: the real number.
int cores = 0;
// Threads that the system still starts; < 0: any number.
std::atomic<int> threads_left{-1};

bool fails(size_t size) {
  if (successes >= 0 && successes-- == 0) {
    one_failed = true;
    if (fault) {
      fault();
      return false;
    }
    return true;
  }
  if (size < kLarge || is_main) {
    return false;
  }
  if (is_stream) {
    // Waits for a helper to fail first.
    for (int i = 0; i < 200000 && starve_helpers && !helper_failed; ++i) {
      std::this_thread::yield();
    }
    return starve_stream;
  }
  helper_failed = helper_failed || starve_helpers;
  return starve_helpers;
}

} // namespace

void* operator new(size_t size) {
  void* memory = fails(size) ? nullptr : std::malloc(size);
  if (!memory) {
    throw std::bad_alloc();
  }
  return memory;
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}

// ---------------------------------- Threads ---------------------------------

unsigned int std::thread::hardware_concurrency() noexcept {
  return cores != 0 ? cores : get_nprocs();
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

// The mock calls this at the first call to Metal. After it no allocation is
// made to fail.
extern "C" void host_metal_on_encoding() {
  successes = -1;
}

namespace {

// ---------------------------------- Faults ----------------------------------

enum Layout { kSame, kTransposed, kSliced };

array lay(const array& x, Layout layout) {
  auto y = layout == kTransposed ? transpose(contiguous(transpose(x)))
      : layout == kSliced
      ? slice(pad(x, 1), {1, 1}, {x.shape(0) + 1, x.shape(1) + 1})
      : x;
  eval(y);
  return y;
}

struct Case {
  const char* name;
  Shape shape;
  Layout w, g, v;
  bool held = false; // somebody else holds w: it may not be reused
  mlx_adadelta::AdaDeltaOptions options{};
};

std::string bytes(const std::vector<array>& arrays) {
  std::string all;
  for (const auto& x : arrays) {
    all.append(x.data<char>(), x.data_size() * x.itemsize());
  }
  return all;
}

// An update of two parameters, which only the graph holds.
struct Group {
  std::vector<array> held;
  std::vector<array> outputs;

  explicit Group(const Case& c) {
    std::vector<array> w, g, v, u;
    for (int i = 0; i < 2; ++i) {
      auto make = [&](int j, Layout layout) {
        auto key = random::key(4 * i + j);
        return lay(random::uniform(c.shape, float32, key), layout);
      };
      w.push_back(make(0, c.w));
      g.push_back(make(1, c.g));
      v.push_back(make(2, c.v));
      u.push_back(make(3, kSame));
    }
    if (c.held) {
      held.insert(held.end(), w.begin(), w.end());
    }
    auto updates =
        mlx_adadelta::adadelta_update(w, g, v, u, array(0.5f), c.options);
    outputs = updates.parameters[0].outputs();
    require(outputs.size() == 6, "a group is not of two parameters");
  }

  // Evaluates as MLX does.
  void evaluate(bool metal, size_t asked_for = 0) {
    auto& arr = outputs[asked_for];
    auto all = arr.outputs();
    if (metal) {
      arr.primitive().eval_gpu(arr.inputs(), all);
    } else {
      arr.primitive().eval_cpu(arr.inputs(), all);
    }
  }

  std::string inputs() const {
    return bytes(outputs[0].inputs());
  }
};

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

// A new stream is a new thread, which has no memory yet.
Stream use_new_stream() {
  auto stream = new_stream(Device::cpu);
  set_default_stream(stream);
  scheduler::enqueue(stream, [] { is_stream = true; });
  return stream;
}

const Case kForHelpers{"helpers", {1031, 523}, kSame, kTransposed, kSame};

std::string expected_for_helpers() {
  Group group(kForHelpers);
  group.evaluate(true);
  synchronize(default_stream(Device::cpu));
  return bytes(group.outputs);
}

// Threads allocate memory of their own at first use. Lets that fail: first the
// helpers', then the stream's where there are no helpers.
void check_helpers() {
  auto expected = expected_for_helpers();
  for (auto* starved : {&starve_helpers, &starve_stream}) {
    auto stream = use_new_stream();
    Group group(kForHelpers);
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
  auto expected = expected_for_helpers();
  auto stream = use_new_stream();
  Group group(kForHelpers);
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
void check_threads(int count) {
  auto expected = expected_for_helpers();
  auto stream = default_stream(Device::cpu);
  Group group(kForHelpers);
  cores = 6;
  threads_left = count;
  group.evaluate(false);
  synchronize(stream);
  require(threads_left == 0, "the pool did not want them all");
  require(bytes(group.outputs) == expected, "wrong results");
}

// --------------------------------- Refusals ---------------------------------

// What Python checks before it calls, C++ callers do not.
void check_refusals() {
  struct Arguments {
    array w = zeros({2}), lr = array(1.0f);
    std::vector<array> g{w}, v{w}, u{w};
    mlx_adadelta::AdaDeltaOptions options{};
  };
  using Set = void (*)(Arguments&);
  const std::pair<const char*, Set> refused[] = {
      {"no gradients", [](Arguments& a) { a.g.clear(); }},
      {"no v", [](Arguments& a) { a.v.clear(); }},
      {"no u", [](Arguments& a) { a.u.clear(); }},
      {"learning rate", [](Arguments& a) { a.lr = a.w; }},
      {"rho", [](Arguments& a) { a.options.rho = 1.5; }},
      {"eps", [](Arguments& a) { a.options.eps = 0; }},
      {"eps, 0 in float32", [](Arguments& a) { a.options.eps = 1e-46; }},
      {"eps, infinite in float32", [](Arguments& a) { a.options.eps = 1e39; }},
      {"decay", [](Arguments& a) { a.options.weight_decay = -1; }},
      {"infinite decay", [](Arguments& a) { a.options.weight_decay = 1e39; }},
      {"state_dtype", [](Arguments& a) { a.options.state_dtype = int32; }},
      {"decays", [](Arguments& a) { a.options.decays = {true, false}; }},
      {"skip", [](Arguments& a) { a.options.skip = a.w; }}};
  auto is_refused = [](const Arguments& a) {
    try {
      mlx_adadelta::adadelta_update({a.w}, a.g, a.v, a.u, a.lr, a.options);
      return false;
    } catch (const std::invalid_argument&) {
      return true;
    }
  };
  require(!is_refused({}), "refused: nothing wrong");
  for (const auto& [what, set] : refused) {
    Arguments a;
    set(a);
    require(is_refused(a), "not refused: ", what);
  }
}

} // namespace

int main(int argc, char** argv) {
  is_main = true;
  cores = 2;
  set_default_device(Device::cpu);
  set_cache_limit(0);
  std::string_view what = argc > 1 ? argv[1] : "";
  if (what == "faults") {
    check_all_faults(argv[2] == std::string_view("metal"));
  } else if (what == "helpers") {
    check_helpers();
  } else if (what == "ahead") {
    check_ahead();
  } else if (what == "errors") {
    fault = fail_earlier_task;
    check_all_faults(false);
  } else if (what == "threads") {
    check_threads(std::atoi(argv[2]));
  } else if (what == "refusals") {
    check_refusals();
  } else {
    return 2;
  }
}
