// The AdaDelta update rule and the tables around it, once: Metal and C++ both
// compile this file.

#ifndef MLX_ADADELTA_STEP_H_
#define MLX_ADADELTA_STEP_H_

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#define ADADELTA_CONSTANT constant
#define ADADELTA_SQRT metal::precise::sqrt
#else
#include <bit>
#include <cmath>
#include <cstdint>
#define ADADELTA_CONSTANT const
#define ADADELTA_SQRT sqrt // of a float or, by its argument, of an MLX array
namespace mlx_adadelta {
using std::sqrt;
}
#endif

#include "rounding.h"

// The types (parameter, gradient, state) that have a kernel of their own. Any
// other gradient is cast to float32 first.
#define ADADELTA_FOR_EACH_TYPES(X) \
  X(float32, float32, float32)     \
  X(float32, float16, float32)     \
  X(float32, bfloat16, float32)    \
  X(float32, float32, float16)     \
  X(float32, float32, bfloat16)    \
  X(float16, float16, float16)     \
  X(float16, float16, float32)     \
  X(float16, float32, float16)     \
  X(float16, float32, float32)     \
  X(float16, float32, bfloat16)    \
  X(bfloat16, bfloat16, bfloat16)  \
  X(bfloat16, bfloat16, float32)   \
  X(bfloat16, float32, bfloat16)   \
  X(bfloat16, float32, float32)    \
  X(bfloat16, float32, float16)

namespace mlx_adadelta {

// What every element of a parameter's update shares. Passed to a kernel as
// bytes.
struct AdaDeltaParams {
  float rho;
  float one_minus_rho; // formed in double: 1.0f - rho is off by one ulp
  float eps;
  float sign; // of the gradient: -1 to maximize, else 1
  float weight_decay; // added to the gradient; 0: not at all
  float decoupled_decay; // taken from the parameter; 0: not at all
  // Stochastic rounding, where it is not 0, and what its bits are made from.
  uint32_t stochastic;
  uint32_t seed[2];
  uint32_t tensor; // the parameter's index in its tree
};
static_assert(sizeof(AdaDeltaParams) == 40, "host and kernel must agree");

// Where the elements of a transposed gradient lie: element (b, r, c) of the
// row-contiguous parameter meets the gradient's element
// b * batch_stride + r + c * column_stride.
struct AdaDeltaTile {
  int64_t batch_stride;
  int64_t column_stride;
  uint32_t rows;
  uint32_t columns;
};
static_assert(sizeof(AdaDeltaTile) == 24, "host and kernel must agree");

// How the Metal kernels cut their work: docs/metal.md has the reasons,
// scripts/tune tries others on a Mac.
constexpr ADADELTA_CONSTANT uint32_t kRun = 4; // neighbours that move at once
constexpr ADADELTA_CONSTANT uint32_t kElementsPerThread = 4; // linear, of kRun
constexpr ADADELTA_CONSTANT uint32_t kThreads = 256; // linear, a threadgroup
constexpr ADADELTA_CONSTANT uint32_t kNormElements = 16; // a thread, of kRun
// A tile has so many bytes, a cache line, along the gradient and along the
// parameter. One word of padding keeps its columns on distinct banks.
constexpr ADADELTA_CONSTANT uint32_t kTileBytes = 128;
constexpr ADADELTA_CONSTANT uint32_t kTileStride = kTileBytes + 4;
constexpr ADADELTA_CONSTANT uint32_t kTileThreads = 256; // a threadgroup

// Elements of a tile's side along arrays of these sizes an element.
constexpr uint32_t tile_side(uint32_t size, uint32_t other) {
  return kTileBytes / (size < other ? size : other);
}

template <typename T>
struct AdaDeltaState {
  T w;
  T v;
  T u;
};

// One step of Zeiler 2012 (arXiv:1212.5701), algorithm 1. T is float in the
// kernels and an MLX array where the rule is transformed as a graph.
template <typename T>
inline AdaDeltaState<T> adadelta_step(
    T w,
    T g,
    T v,
    T u,
    T lr,
    T gradient_scale,
    ADADELTA_CONSTANT AdaDeltaParams& p) {
  g = p.sign * gradient_scale * g;
  if (p.weight_decay != 0) {
    g = g + p.weight_decay * w;
  }
  if (p.decoupled_decay != 0) {
    w = w - lr * p.decoupled_decay * w;
  }
  T new_v = p.rho * v + p.one_minus_rho * (g * g);
  T d = ADADELTA_SQRT(u + p.eps) / ADADELTA_SQRT(new_v + p.eps) * g;
  T new_u = p.rho * u + p.one_minus_rho * (d * d);
  return {w - lr * d, new_v, new_u};
}

// The keys of a parameter's random bits at a step.
inline RandomKeys adadelta_keys(
    uint64_t step,
    ADADELTA_CONSTANT AdaDeltaParams& p) {
  return philox(
      static_cast<uint32_t>(step),
      static_cast<uint32_t>(step >> 32),
      p.tensor,
      0,
      p.seed[0],
      p.seed[1]);
}

} // namespace mlx_adadelta

#endif // MLX_ADADELTA_STEP_H_
