// Metal kernels of the fused AdaDelta update.

#include "adadelta_step.h"

using mlx_adadelta::adadelta_random;
using mlx_adadelta::adadelta_step;
using mlx_adadelta::AdaDeltaParams;
using mlx_adadelta::AdaDeltaState;
using mlx_adadelta::AdaDeltaTile;
using mlx_adadelta::kElementsPerThread;
using mlx_adadelta::kTileSize;
using mlx_adadelta::kTileStride;
using mlx_adadelta::RandomWords;

// As MLX names them; Apple's headers have taken float16 and bfloat16.
typedef float float32_t;
typedef half float16_t;
typedef bfloat bfloat16_t;

// What all elements share and only the device knows.
struct Scalars {
  float lr;
  float gradient_scale;
  bool skip;
  ulong step;
};

// Rounds to the nearest, or with the given bits stochastically.
template <typename T>
struct Round;

template <>
struct Round<float> {
  static float nearest(float x) {
    return x;
  }
  static float stochastic(float x, uint) {
    return x;
  }
};

template <>
struct Round<half> {
  static half nearest(float x) {
    return static_cast<half>(x);
  }
  static half stochastic(float x, uint random) {
    const uint bits =
        mlx_adadelta::round_to_float16(as_type<uint>(x), random);
    return as_type<half>(static_cast<ushort>(bits));
  }
};

template <>
struct Round<bfloat> {
  static bfloat nearest(float x) {
    return static_cast<bfloat>(x);
  }
  static bfloat stochastic(float x, uint random) {
    const uint bits =
        mlx_adadelta::round_to_bfloat16(as_type<uint>(x), random);
    return as_type<bfloat>(static_cast<ushort>(bits));
  }
};

// Reads, updates and writes element i. Every thread reads its own elements
// before it writes them, so outputs may share memory with w, v and u.
template <typename W, typename S>
inline void update_element(
    const device W* w,
    const device S* v,
    const device S* u,
    device W* w_out,
    device S* v_out,
    device S* u_out,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params,
    float g,
    ulong i) {
  const W old_w = w[i];
  const S old_v = v[i];
  const S old_u = u[i];
  if (scalars.skip) {
    w_out[i] = old_w;
    v_out[i] = old_v;
    u_out[i] = old_u;
    return;
  }
  AdaDeltaState<float> next = adadelta_step<float>(
      static_cast<float>(old_w),
      g,
      static_cast<float>(old_v),
      static_cast<float>(old_u),
      scalars.lr,
      scalars.gradient_scale,
      params);
  if (params.stochastic != 0) {
    const RandomWords random = adadelta_random(i, scalars.step, params);
    w_out[i] = Round<W>::stochastic(next.w, random.x[0]);
    v_out[i] = Round<S>::stochastic(next.v, random.x[1]);
    u_out[i] = Round<S>::stochastic(next.u, random.x[2]);
  } else {
    w_out[i] = Round<W>::nearest(next.w);
    v_out[i] = Round<S>::nearest(next.v);
    u_out[i] = Round<S>::nearest(next.u);
  }
}

// adadelta_linear_<w>_<g>_<state>: all arrays lie alike, n elements.
//
//   buffers  0 w, 1 g, 2 v, 3 u; out 4 w, 5 v, 6 u (may be w, v and u
//            themselves); one value each: 7 lr, 8 gradient scale, 9 skip,
//            10 step; 11 params; 12 n
//   grid     ceil(n / (threads * kElementsPerThread)) threadgroups, 1-D
//   bytes    per element 2 w + 1 g + 4 state: 28 in float32, 14 in 16 bits
template <typename W, typename G, typename S>
inline void update_linear(
    const device W* w,
    const device G* g,
    const device S* v,
    const device S* u,
    device W* w_out,
    device S* v_out,
    device S* u_out,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params,
    ulong n,
    ulong thread_index) {
  ulong begin = thread_index * kElementsPerThread;
  ulong end = begin + kElementsPerThread;
  if (end <= n) {
    for (uint k = 0; k < kElementsPerThread; ++k) {
      ulong i = begin + k;
      update_element(
          w,
          v,
          u,
          w_out,
          v_out,
          u_out,
          scalars,
          params,
          static_cast<float>(g[i]),
          i);
    }
  } else {
    for (ulong i = begin; i < n; ++i) {
      update_element(
          w,
          v,
          u,
          w_out,
          v_out,
          u_out,
          scalars,
          params,
          static_cast<float>(g[i]),
          i);
    }
  }
}

// adadelta_tiled_<w>_<g>_<state>: w, v and u are row-contiguous (batch, rows,
// columns), each matrix of g is transposed. A threadgroup stages a square of
// g in threadgroup memory, so that g is read along its rows and the rest
// along theirs.
//
//   buffers  0 w, 1 g, 2 v, 3 u; out 4 w, 5 v, 6 u (may be w, v and u
//            themselves); one value each: 7 lr, 8 gradient scale, 9 skip,
//            10 step; 11 params; 12 tile
//   grid     (ceil(columns / kTileSize), ceil(rows / kTileSize), batch)
//            threadgroups of (kTileSize, kTileSize / kElementsPerThread)
//   memory   kTileSize * kTileStride floats in threadgroup slot 0
//   bytes    as the linear kernel: g is read once
template <typename W, typename G, typename S>
inline void update_tiled(
    const device W* w,
    const device G* g,
    const device S* v,
    const device S* u,
    device W* w_out,
    device S* v_out,
    device S* u_out,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params,
    constant AdaDeltaTile& tile,
    threadgroup float* staged,
    uint3 group,
    uint3 lane) {
  const uint step = kTileSize / kElementsPerThread;
  const ulong first_row = static_cast<ulong>(group.y) * kTileSize;
  const ulong first_column = static_cast<ulong>(group.x) * kTileSize;
  const ulong batch = group.z;

  const ulong g_row = first_row + lane.x;
  for (uint k = lane.y; k < kTileSize; k += step) {
    const ulong g_column = first_column + k;
    if (g_row < tile.rows && g_column < tile.columns) {
      const long at = static_cast<long>(batch) * tile.batch_stride +
          static_cast<long>(g_row) +
          static_cast<long>(g_column) * tile.column_stride;
      staged[k * kTileStride + lane.x] = static_cast<float>(g[at]);
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

  const ulong column = first_column + lane.x;
  for (uint k = lane.y; k < kTileSize; k += step) {
    const ulong row = first_row + k;
    if (row < tile.rows && column < tile.columns) {
      const ulong i = (batch * tile.rows + row) * tile.columns + column;
      const float staged_g = staged[lane.x * kTileStride + k];
      update_element(
          w, v, u, w_out, v_out, u_out, scalars, params, staged_g, i);
    }
  }
}

// clang-format off
#define ADADELTA_KERNELS(W, G, S)                                     \
  kernel void adadelta_linear_##W##_##G##_##S(                        \
      const device W##_t* w [[buffer(0)]],                            \
      const device G##_t* g [[buffer(1)]],                            \
      const device S##_t* v [[buffer(2)]],                            \
      const device S##_t* u [[buffer(3)]],                            \
      device W##_t* w_out [[buffer(4)]],                              \
      device S##_t* v_out [[buffer(5)]],                              \
      device S##_t* u_out [[buffer(6)]],                              \
      const device float* lr [[buffer(7)]],                           \
      const device float* gradient_scale [[buffer(8)]],               \
      const device bool* skip [[buffer(9)]],                          \
      const device ulong* step [[buffer(10)]],                        \
      constant AdaDeltaParams& params [[buffer(11)]],                 \
      constant ulong& n [[buffer(12)]],                               \
      uint group [[threadgroup_position_in_grid]],                    \
      uint lane [[thread_position_in_threadgroup]],                   \
      uint lanes [[threads_per_threadgroup]]) {                       \
    const Scalars scalars = {                                         \
        lr[0], gradient_scale[0], skip[0], step[0]};                  \
    update_linear<W##_t, G##_t, S##_t>(                               \
        w, g, v, u, w_out, v_out, u_out, scalars, params, n,          \
        static_cast<ulong>(group) * lanes + lane);                    \
  }                                                                   \
  kernel void adadelta_tiled_##W##_##G##_##S(                         \
      const device W##_t* w [[buffer(0)]],                            \
      const device G##_t* g [[buffer(1)]],                            \
      const device S##_t* v [[buffer(2)]],                            \
      const device S##_t* u [[buffer(3)]],                            \
      device W##_t* w_out [[buffer(4)]],                              \
      device S##_t* v_out [[buffer(5)]],                              \
      device S##_t* u_out [[buffer(6)]],                              \
      const device float* lr [[buffer(7)]],                           \
      const device float* gradient_scale [[buffer(8)]],               \
      const device bool* skip [[buffer(9)]],                          \
      const device ulong* step [[buffer(10)]],                        \
      constant AdaDeltaParams& params [[buffer(11)]],                 \
      constant AdaDeltaTile& tile [[buffer(12)]],                     \
      threadgroup float* staged [[threadgroup(0)]],                   \
      uint3 group [[threadgroup_position_in_grid]],                   \
      uint3 lane [[thread_position_in_threadgroup]]) {                \
    const Scalars scalars = {                                         \
        lr[0], gradient_scale[0], skip[0], step[0]};                  \
    update_tiled<W##_t, G##_t, S##_t>(                                \
        w, g, v, u, w_out, v_out, u_out, scalars, params, tile,       \
        staged, group, lane);                                         \
  }
// clang-format on

ADADELTA_FOR_EACH_TYPES(ADADELTA_KERNELS)
