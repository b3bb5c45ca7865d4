// Metal kernels of the gradients' global norm.

#include "adadelta_step.h"

namespace mlx_adadelta {

// Sums of squares in two scales, since a float holds no square of 1e20 or
// 1e-24. The high one is finite wherever each of 2^32 elements is; the low one
// is exact enough unless it overflows.
struct Squares {
  float high; // of x * 2^-80
  float low; // of x * 2^20
};

constexpr ADADELTA_CONSTANT float kHigh = 8.271806125530277e-25f; // 2^-80
constexpr ADADELTA_CONSTANT float kLow = 1048576.0f; // 2^20
constexpr ADADELTA_CONSTANT float kLargest = 3.402823466e38f; // finite float

inline void add_square(thread Squares& sum, float x) {
  sum.high += (x * kHigh) * (x * kHigh);
  sum.low += (x * kLow) * (x * kLow);
}

// Adds x, and what is rounded off to `lost` (Knuth, TAOCP 4.2.2, theorem B).
inline void add_exactly(thread float& sum, thread float& lost, float x) {
  const float old = sum;
  sum = old + x;
  const float added = sum - old;
  lost += (old - (sum - added)) + (x - added);
}

// Adds up the sums of a threadgroup, in pairs.
inline void
add_up(thread Squares& sum, threadgroup float* shared, uint lane, uint lanes) {
  shared[lane] = sum.high;
  shared[lanes + lane] = sum.low;
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  for (uint n = lanes; n > 1;) {
    const uint kept = (n + 1) / 2;
    if (lane + kept < n) {
      shared[lane] = shared[lane] + shared[lane + kept];
      shared[lanes + lane] = shared[lanes + lane] + shared[lanes + lane + kept];
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    n = kept;
  }
  sum.high = shared[0];
  sum.low = shared[lanes];
}

// norm_sums_<type>: the sums of each threadgroup's squares.
//
//   buffers  0 g, n elements in any order; out 1 sums, two a threadgroup;
//            2 n; 3 first, the place of the first threadgroup's sums
//   grid     ceil(n / (threads * kNormElements)) threadgroups, 1-D
//   memory   8 bytes a thread in threadgroup slot 0
//   bytes    an element's own: it is read once
template <typename T, typename Four>
inline void sum_squares(
    const device T* g,
    device float* sums,
    uint64_t n,
    uint first,
    threadgroup float* shared,
    uint group,
    uint lane,
    uint lanes) {
  const uint64_t begin = static_cast<uint64_t>(group) * lanes * kNormElements;
  const device T* x = g + begin;
  Squares sum = {0.0f, 0.0f};
  if (begin + lanes * kNormElements <= n) {
    for (uint i = 0; i < kNormElements / kRun; ++i) {
      const Four run =
          *reinterpret_cast<const device Four*>(x + (i * lanes + lane) * kRun);
      for (uint k = 0; k < kRun; ++k) {
        add_square(sum, static_cast<float>(run[k]));
      }
    }
  } else {
    for (uint i = lane; i < static_cast<uint>(n - begin); i += lanes) {
      add_square(sum, static_cast<float>(x[i]));
    }
  }
  add_up(sum, shared, lane, lanes);
  if (lane == 0) {
    sums[2 * (first + group)] = sum.high;
    sums[2 * (first + group) + 1] = sum.low;
  }
}

// norm_total: the norm, and whether an element is not finite.
//
//   buffers  0 sums, two each; out 1 norm and 1 or 0; 2 count of sums
//   grid     one threadgroup
//   memory   8 bytes a thread in threadgroup slot 0
inline void total(
    const device float* sums,
    device float* norm,
    uint count,
    threadgroup float* shared,
    uint lane,
    uint lanes) {
  Squares sum = {0.0f, 0.0f};
  Squares lost = {0.0f, 0.0f};
  for (uint i = lane; i < count; i += lanes) {
    add_exactly(sum.high, lost.high, sums[2 * i]);
    add_exactly(sum.low, lost.low, sums[2 * i + 1]);
  }
  // Beside an infinite sum, what was lost is a NaN.
  sum.high = sum.high <= kLargest ? sum.high + lost.high : sum.high;
  sum.low = sum.low <= kLargest ? sum.low + lost.low : sum.low;
  add_up(sum, shared, lane, lanes);
  if (lane == 0) {
    norm[0] = sum.low <= kLargest ? ADADELTA_SQRT(sum.low) / kLow
                                  : ADADELTA_SQRT(sum.high) / kHigh;
    norm[1] = sum.high <= kLargest ? 0.0f : 1.0f;
  }
}

} // namespace mlx_adadelta

// clang-format off
#define ADADELTA_NORM_SUMS(NAME, T)                                   \
  [[kernel]] void norm_sums_##NAME(                                   \
      const device T* g [[buffer(0)]],                                \
      device float* sums_out [[buffer(1)]],                           \
      constant uint64_t& n [[buffer(2)]],                             \
      constant uint& first [[buffer(3)]],                             \
      threadgroup float* shared [[threadgroup(0)]],                   \
      uint group [[threadgroup_position_in_grid]],                    \
      uint lane [[thread_position_in_threadgroup]],                   \
      uint lanes [[threads_per_threadgroup]]) {                       \
    mlx_adadelta::sum_squares<T, packed_##T##4>(                      \
        g, sums_out, n, first, shared, group, lane, lanes);           \
  }
// clang-format on

ADADELTA_NORM_SUMS(float32, float)
ADADELTA_NORM_SUMS(float16, half)
ADADELTA_NORM_SUMS(bfloat16, bfloat)

[[kernel]] void norm_total(
    const device float* sums [[buffer(0)]],
    device float* norm_out [[buffer(1)]],
    constant uint& count [[buffer(2)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint lane [[thread_position_in_threadgroup]],
    uint lanes [[threads_per_threadgroup]]) {
  mlx_adadelta::total(sums, norm_out, count, shared, lane, lanes);
}
