#include "executor.h"

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

namespace host_metal {

namespace {

struct Barrier {
  virtual void wait() = 0;
};

thread_local Barrier* barrier = nullptr;

// Guard bytes behind threadgroup memory, where AddressSanitizer is not there.
constexpr size_t kGuard = __has_feature(address_sanitizer) ? 0 : 4096;

class Memory {
 public:
  static constexpr char kNaN = '\xff'; // a NaN, once every byte is this
  explicit Memory(size_t size) : size_(size), bytes_(size + kGuard, kNaN) {}

  void fill_with_nan() {
    auto written = [](char byte) { return byte != kNaN; };
    if (std::any_of(bytes_.begin() + size_, bytes_.end(), written)) {
      throw std::logic_error("threadgroup memory is too small");
    }
    bytes_.assign(bytes_.size(), kNaN);
  }

  void run_lane(const Launch& launch, size_t group, size_t lane) {
    launch.kernel->run(
        {launch.buffers,
         bytes_.data(),
         launch.threads,
         launch.grid,
         position(group, launch.grid),
         position(lane, launch.threads)});
  }

 private:
  static Size position(size_t i, const Size& extent) {
    return {
        static_cast<uint32_t>(i % extent.x),
        static_cast<uint32_t>(i / extent.x % extent.y),
        static_cast<uint32_t>(i / extent.x / extent.y)};
  }

  size_t size_;
  std::vector<char> bytes_;
};

// A fiber runs lane after lane. Where one waits at a barrier the next fiber
// goes on with the lanes left, so a kernel without barriers needs one fiber.
class Fibers : public Barrier {
 public:
  void run_group(const Launch& launch, Memory& memory, size_t group) {
    size_t lanes = launch.threads.count();
    size_t next = 0;
    run_lanes_ = [&] {
      while (next < lanes) {
        memory.run_lane(launch, group, next++);
      }
    };
    std::vector<Fiber*> waiting;
    while (next < lanes) {
      if (fibers_.size() == waiting.size()) {
        fibers_.push_back(std::make_unique<Fiber>());
      }
      auto* fiber = fibers_[waiting.size()].get();
      start(*fiber);
      if (fiber->waits) {
        waiting.push_back(fiber);
      }
    }
    while (!waiting.empty()) {
      if (waiting.size() != lanes) {
        throw std::logic_error("a lane returned before a barrier");
      }
      for (auto* fiber : waiting) {
        resume(*fiber);
      }
      std::erase_if(waiting, [](auto* fiber) { return !fiber->waits; });
    }
  }

  void wait() override {
    running_->waits = true;
    swapcontext(&running_->context, &scheduler_);
  }

 private:
  struct Fiber {
    ucontext_t context;
    bool waits;
    char stack[1 << 16];
  };

  void start(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = sizeof(fiber.stack);
    fiber.context.uc_link = &scheduler_;
    auto run = [] { static_cast<Fibers*>(barrier)->run_lanes_(); };
    makecontext(&fiber.context, run, 0);
    resume(fiber);
  }

  void resume(Fiber& fiber) {
    fiber.waits = false;
    running_ = &fiber;
    swapcontext(&scheduler_, &fiber.context);
  }

  std::function<void()> run_lanes_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* running_;
  ucontext_t scheduler_;
};

// All threads of a group meet at the same barrier, or all at the end.
class Threads : public Barrier {
 public:
  explicit Threads(size_t lanes) : lanes_(lanes) {}

  void wait() override {
    meet(nullptr);
  }

  void meet(Memory* at_end) {
    auto meeting = meetings_.load();
    {
      std::lock_guard lock(mutex_);
      if (arrived_ > 0 && at_end != at_end_) {
        throw std::logic_error("a lane returned before a barrier");
      }
      at_end_ = at_end;
      if (++arrived_ == lanes_) {
        if (at_end) {
          at_end->fill_with_nan(); // for the next group
        }
        arrived_ = 0;
        ++meetings_;
        meetings_.notify_all();
        return;
      }
    }
    meetings_.wait(meeting);
  }

 private:
  size_t lanes_;
  std::mutex mutex_;
  std::atomic<int> meetings_ = 0;
  size_t arrived_ = 0;
  Memory* at_end_ = nullptr;
};

} // namespace

void wait_at_barrier() {
  barrier->wait();
}

void run_with_fibers(const Launch& launch, size_t most_groups) {
  static thread_local Fibers fibers;
  barrier = &fibers;
  Memory memory(launch.threadgroup_bytes);
  size_t groups = launch.grid.count();
  for (size_t group = 0; group < groups; ++group) {
    if (group == most_groups) {
      group = std::max(group, groups - std::min(groups, most_groups));
    }
    fibers.run_group(launch, memory, group);
    memory.fill_with_nan();
  }
}

void run_with_threads(const std::vector<Launch>& launches, size_t lanes) {
  // Two sets of threads share the groups. They do not synchronize, because that
  // would hide a race between groups.
  auto run_every_second_group = [&](size_t first) {
    std::vector<Memory> memories;
    for (const auto& launch : launches) {
      memories.emplace_back(launch.threadgroup_bytes);
    }
    Threads set(lanes);
    std::vector<std::jthread> threads;
    for (size_t lane = 0; lane < lanes; ++lane) {
      threads.emplace_back([&, lane] {
        barrier = &set;
        for (size_t i = 0; i < launches.size(); ++i) {
          size_t groups = launches[i].grid.count();
          for (size_t group = first; group < groups; group += 2) {
            memories[i].run_lane(launches[i], group, lane);
            set.meet(&memories[i]);
          }
        }
      });
    }
  };
  std::jthread other(run_every_second_group, 1);
  run_every_second_group(0);
}

} // namespace host_metal
