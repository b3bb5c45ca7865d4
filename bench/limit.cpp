// The lower limits of an AdaDelta step's time: its memory traffic without
// arithmetic, and its arithmetic without traffic.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "adadelta_step.h"

namespace {

constexpr size_t kUnit = 1 << 16;

// Calls work(begin, end) for the units of every step, on all threads.
template <typename Work>
void run(size_t size, size_t threads, size_t steps, const Work& work) {
  size_t units = (size + kUnit - 1) / kUnit;
  std::vector<std::atomic<size_t>> next(steps);
  std::vector<std::atomic<size_t>> arrived(steps);
  auto take_units = [&] {
    for (size_t step = 0; step < steps; ++step) {
      for (size_t i = next[step]++; i < units; i = next[step]++) {
        work(i * kUnit, std::min((i + 1) * kUnit, size));
      }
      ++arrived[step];
      while (arrived[step] < threads) {
        std::this_thread::yield();
      }
    }
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads; ++i) {
    others.emplace_back(take_units);
  }
  take_units();
  for (auto& other : others) {
    other.join();
  }
}

// w, g, v and u are read, w, v and u written in place.
template <typename W, typename S>
void move(void** arrays, size_t size, size_t threads, size_t steps) {
  run(size, threads, steps, [=](size_t begin, size_t end) {
    auto* __restrict w = static_cast<W*>(arrays[0]);
    auto* __restrict g = static_cast<W*>(arrays[1]);
    auto* __restrict v = static_cast<S*>(arrays[2]);
    auto* __restrict u = static_cast<S*>(arrays[3]);
    for (size_t i = begin; i < end; ++i) {
      W x = g[i];
      w[i] += x;
      v[i] += x;
      u[i] += x;
    }
  });
}

// The gradients are read.
template <typename G>
void read(void** arrays, size_t size, size_t threads, size_t steps) {
  auto g = static_cast<const G*>(arrays[1]);
  run(size, threads, steps, [=](size_t begin, size_t end) {
    G all = 0;
    for (size_t i = begin; i < end; ++i) {
      all |= g[i];
    }
    asm volatile("" : : "r"(all)); // it is used
  });
}

} // namespace

// The arrays are w, g, v and u; w and g of one type, v and u of another.
// Without v and u it is the norm's traffic.
extern "C" void traffic(
    void** arrays,
    size_t weight_bytes,
    size_t state_bytes,
    size_t size,
    size_t threads,
    size_t steps) {
  auto loop = state_bytes == 0
      ? (weight_bytes == 2 ? read<uint16_t> : read<uint32_t>)
      : weight_bytes == 2
      ? (state_bytes == 2 ? move<uint16_t, uint16_t> : move<uint16_t, uint32_t>)
      : (state_bytes == 2 ? move<uint32_t, uint16_t>
                          : move<uint32_t, uint32_t>);
  loop(arrays, size, threads, steps);
}

// Always in float32, on data that stays in the cache.
extern "C" void arithmetic(size_t size, size_t threads, size_t steps) {
  run(size, threads, steps, [](size_t begin, size_t end) {
    constexpr size_t kBlock = 1024;
    float w[kBlock], g[kBlock], v[kBlock], u[kBlock];
    for (size_t i = 0; i < kBlock; ++i) {
      w[i] = g[i] = v[i] = u[i] = 1 + static_cast<float>(i);
    }
    mlx_adadelta::AdaDeltaParams params{
        .rho = 0.9f, .one_minus_rho = 0.1f, .eps = 1e-6f, .sign = 1};
    for (; begin < end; begin += kBlock) {
      size_t count = std::min(kBlock, end - begin);
      for (size_t i = 0; i < count; ++i) {
        auto next = mlx_adadelta::adadelta_step(
            w[i], g[i], v[i], u[i], 1.0f, 1.0f, params);
        w[i] = next.w;
        v[i] = next.v;
        u[i] = next.u;
      }
      // Tell the compiler that these are used and changed.
      asm volatile("" : : "r"(w), "r"(g), "r"(v), "r"(u) : "memory");
    }
  });
}
