// The traffic of AdaDelta steps without their arithmetic: w, g, v and u are
// read, w, v and u written in place.

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

extern "C" void traffic(
    float* w,
    const float* g,
    float* v,
    float* u,
    size_t size,
    size_t threads,
    size_t steps) {
  constexpr size_t kUnit = 1 << 16;
  size_t units = (size + kUnit - 1) / kUnit;
  std::vector<std::atomic<size_t>> next(steps);
  std::vector<std::atomic<size_t>> arrived(steps);
  auto work = [&] {
    for (size_t step = 0; step < steps; ++step) {
      for (size_t i = next[step]++; i < units; i = next[step]++) {
        size_t end = i + 1 < units ? (i + 1) * kUnit : size;
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
        for (size_t j = i * kUnit; j < end; ++j) {
          float x = g[j];
          w[j] += x;
          v[j] += x;
          u[j] += x;
        }
      }
      ++arrived[step];
      while (arrived[step] < threads) {
        std::this_thread::yield();
      }
    }
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads; ++i) {
    others.emplace_back(work);
  }
  work();
  for (auto& other : others) {
    other.join();
  }
}
