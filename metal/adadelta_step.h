// The AdaDelta update rule and the tables around it, once: Metal and C++ both
// compile this file.

#ifndef MLX_ADADELTA_STEP_H_
#define MLX_ADADELTA_STEP_H_

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#define ADADELTA_CONSTANT constant
#define ADADELTA_MATH metal::precise
#else
#include <cmath>
#define ADADELTA_CONSTANT const
#define ADADELTA_MATH std
#endif

// The types (parameter, gradient, state) that have a kernel of their own. The
// op casts anything else to float32 first.
#define ADADELTA_FOR_EACH_TYPES(X) \
  X(float32, float32, float32)     \
  X(float32, float16, float32)     \
  X(float32, bfloat16, float32)    \
  X(float16, float16, float16)     \
  X(float16, float16, float32)     \
  X(float16, float32, float16)     \
  X(float16, float32, float32)     \
  X(bfloat16, bfloat16, bfloat16)  \
  X(bfloat16, bfloat16, float32)   \
  X(bfloat16, float32, bfloat16)   \
  X(bfloat16, float32, float32)

namespace mlx_adadelta {

// What every element of an update shares. Passed to a kernel as bytes.
struct AdaDeltaParams {
  float rho;
  float one_minus_rho; // formed in double: 1.0f - rho is off by one ulp
  float eps;
};
static_assert(sizeof(AdaDeltaParams) == 12, "host and kernel must agree");

// Where the elements of a transposed gradient lie: element (b, r, c) of the
// row-contiguous parameter meets the gradient's element
// b * batch_stride + r + c * column_stride.
struct AdaDeltaTile {
  long batch_stride;
  long column_stride;
  unsigned int rows;
  unsigned int columns;
};
static_assert(sizeof(AdaDeltaTile) == 24, "host and kernel must agree");

template <typename T>
struct AdaDeltaState {
  T w;
  T v;
  T u;
};

// One step of Zeiler 2012 (arXiv:1212.5701), algorithm 1. T is float in the
// kernels and an MLX array where the rule is transformed as a graph.
template <typename T>
inline AdaDeltaState<T>
adadelta_step(T w, T g, T v, T u, T lr, ADADELTA_CONSTANT AdaDeltaParams& p) {
  using ADADELTA_MATH::sqrt;
  T new_v = p.rho * v + p.one_minus_rho * (g * g);
  T d = sqrt(u + p.eps) / sqrt(new_v + p.eps) * g;
  T new_u = p.rho * u + p.one_minus_rho * (d * d);
  return {w - lr * d, new_v, new_u};
}

} // namespace mlx_adadelta

#endif // MLX_ADADELTA_STEP_H_
