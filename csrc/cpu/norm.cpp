#include "norm.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "convert.h"
#include "job.h"
#include "layout.h"

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

// How far ahead to ask for memory: one stream needs more than an update's four.
constexpr size_t kAheadBytes = 4096;
// A thread takes this many elements at a time.
constexpr size_t kUnit = 1 << 16;
// For fewer elements a second thread costs more than it saves.
constexpr size_t kParallel = 1 << 19;

// Sums that advance side by side, as wide as the widest vectors: the result is
// the same on every processor. In double no square of a float32 overflows or
// vanishes.
constexpr size_t kLanes = 16;
using Sums = std::array<double, kLanes>;

// All but the last few of n elements; returns how many.
ADADELTA_CLONES size_t
add_blocks(Dtype type, const std::byte* x, size_t n, Sums& sums) {
  alignas(64) float buffer[kBlock];
  double lanes[kLanes];
  std::copy_n(sums.begin(), kLanes, lanes);
  size_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    const std::byte* block = x + i * type.size();
    prefetch(type, block + kAheadBytes);
    const float* y = widen(type, block, buffer);
    for (size_t j = 0; j < kBlock; j += kLanes) {
      for (size_t k = 0; k < kLanes; ++k) {
        double value = y[j + k];
        lanes[k] += value * value;
      }
    }
  }
  std::copy_n(lanes, kLanes, sums.begin());
  return i;
}

// n elements side by side.
void add(Dtype type, const std::byte* x, size_t n, Sums& sums) {
  size_t done = add_blocks(type, x, n, sums);
  if (done < n) {
    alignas(64) std::byte block[kBlock * sizeof(float)]{};
    std::memcpy(block, x + done * type.size(), (n - done) * type.size());
    add_blocks(type, block, kBlock, sums);
  }
}

// A gradient as it lies in memory: every element that is stored, once.
struct Stored {
  Dtype type;
  const std::byte* begin; // of the lowest address
  size_t size = 1;
  double repeats = 1; // how often each element counts
  std::vector<Axis> axes; // outermost first

  explicit Stored(const array& x)
      : type(x.dtype()), begin(x.data<std::byte>()) {
    std::vector<Axis> all;
    for (size_t i = 0; i < x.ndim(); ++i) {
      Axis axis{x.shape(i), x.strides(i)};
      if (axis.stride == 0) {
        repeats *= axis.length;
        axis.length = 1;
      } else if (axis.stride < 0) {
        begin += (axis.length - 1) * axis.stride * int64_t{type.size()};
        axis.stride = -axis.stride;
      }
      size *= axis.length;
      if (axis.length != 1) {
        all.push_back(axis);
      }
    }
    std::sort(all.begin(), all.end(), [](const Axis& a, const Axis& b) {
      return a.stride > b.stride;
    });
    for (const auto& axis : all) {
      add_axis(axes, axis);
    }
  }

  // The sum of a unit's squares.
  double sum(size_t unit) const {
    Sums sums{};
    size_t end = std::min(size, (unit + 1) * kUnit);
    if (axes.empty() || (axes.size() == 1 && axes[0].stride == 1)) {
      size_t i = unit * kUnit;
      add(type, begin + i * type.size(), end - i, sums);
    } else if (type == float32) {
      add_scattered<4>(unit * kUnit, end, sums);
    } else {
      add_scattered<2>(unit * kUnit, end, sums);
    }
    double all = 0;
    for (double sum : sums) {
      all += sum;
    }
    return repeats * all;
  }

  // Gathers a few elements, of so many bytes, at a time.
  template <size_t kBytes>
  void add_scattered(size_t i, size_t end, Sums& sums) const {
    constexpr size_t most = 8 * kBlock;
    alignas(64) std::byte few[most * kBytes];
    size_t n = 0;
    while (i < end) {
      // What is left of the innermost axis.
      const auto& axis = axes.back();
      size_t at = i % axis.length;
      size_t place = at * axis.stride; // of the next element
      size_t outer = i / axis.length;
      for (size_t k = axes.size() - 1; k-- > 0;) {
        place += outer % axes[k].length * axes[k].stride;
        outer /= axes[k].length;
      }
      size_t length = std::min<size_t>(axis.length - at, end - i);
      length = std::min(length, most - n);
      for (size_t k = 0; k < length; ++k, place += axis.stride) {
        std::memcpy(few + (n + k) * kBytes, begin + place * kBytes, kBytes);
      }
      n += length;
      i += length;
      if (n == most || i == end) {
        add(type, few, n, sums);
        n = 0;
      }
    }
  }
};

class NormJob : public Job {
 public:
  NormJob(const std::vector<array>& gradients, float* result)
      : result_(result) {
    size_t size = 0;
    gradients_.reserve(gradients.size());
    ends_.reserve(gradients.size());
    for (const auto& x : gradients) {
      if (x.size() == 0) {
        continue;
      }
      const auto& stored = gradients_.emplace_back(x);
      units += (stored.size + kUnit - 1) / kUnit;
      ends_.push_back(units);
      size += stored.size;
    }
    helpers = size / kParallel;
    sums_.resize(units);
  }

  void run_unit(size_t unit) override {
    auto end = std::upper_bound(ends_.begin(), ends_.end(), unit);
    size_t first = end == ends_.begin() ? 0 : *(end - 1);
    sums_[unit] = gradients_[end - ends_.begin()].sum(unit - first);
  }

  // In order, whoever took which unit.
  void finish() override {
    double all = 0;
    for (double sum : sums_) {
      all += sum;
    }
    result_[0] = static_cast<float>(std::sqrt(all));
    result_[1] = std::isfinite(all) ? 0 : 1;
  }

 private:
  std::vector<Stored> gradients_;
  std::vector<size_t> ends_; // of each gradient's units
  std::vector<double> sums_; // of each unit
  float* result_; // the norm, and whether an element is not finite
};

} // namespace

void GradientNorm::eval_cpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  auto& out = outputs[0];
  out.set_data(allocator::malloc(out.nbytes()));
  auto job = std::make_shared<NormJob>(inputs, out.data<float>());
  dispatch(stream(), job, [] {});
}

} // namespace mlx_adadelta
