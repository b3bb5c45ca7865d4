// Metal kernels of the fused AdaDelta update.

#include "adadelta_step.h"

// A thread's elements live in registers once no index into them is left.
#define ADADELTA_UNROLL _Pragma("clang loop unroll(full)")

namespace mlx_adadelta {

// What all elements share and only the device knows.
struct Scalars {
  float lr;
  float gradient_scale;
  bool skip;
  uint64_t step;
};

// Rounds to the nearest, or with the given bits stochastically.
template <typename T>
struct Round {
  static T nearest(float x) {
    return static_cast<T>(x);
  }
  static T stochastic(float x, uint random);
};

template <>
inline float Round<float>::stochastic(float x, uint) {
  return x;
}

template <>
inline half Round<half>::stochastic(float x, uint random) {
  const uint bits = round_to_float16(as_type<uint>(x), random);
  return as_type<half>(static_cast<ushort>(bits));
}

template <>
inline bfloat Round<bfloat>::stochastic(float x, uint random) {
  const uint bits = round_to_bfloat16(as_type<uint>(x), random);
  return as_type<bfloat>(static_cast<ushort>(bits));
}

template <typename W, typename G, typename S>
struct Arrays {
  const device W* w;
  const device G* g;
  const device S* v;
  const device S* u;
  device W* w_out;
  device S* v_out;
  device S* u_out;
};

// A thread's N elements. Each is read before any is written, so that outputs
// may share memory with w, v and u, and that the reads need not wait.
template <typename W, typename G, typename S, uint N>
struct Elements {
  W w[N];
  G g[N];
  S v[N];
  S u[N];
  uint64_t place[N]; // in memory
};

template <bool kStochastic, typename W, typename G, typename S, uint N>
inline void update_each(
    thread Elements<W, G, S, N>& x,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params) {
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    const AdaDeltaState<float> next = adadelta_step<float>(
        static_cast<float>(x.w[k]),
        static_cast<float>(x.g[k]),
        static_cast<float>(x.v[k]),
        static_cast<float>(x.u[k]),
        scalars.lr,
        scalars.gradient_scale,
        params);
    if (kStochastic) {
      const RandomWords random =
          adadelta_random(x.place[k], scalars.step, params);
      x.w[k] = Round<W>::stochastic(next.w, random.x[0]);
      x.v[k] = Round<S>::stochastic(next.v, random.x[1]);
      x.u[k] = Round<S>::stochastic(next.u, random.x[2]);
    } else {
      x.w[k] = Round<W>::nearest(next.w);
      x.v[k] = Round<S>::nearest(next.v);
      x.u[k] = Round<S>::nearest(next.u);
    }
  }
}

// Decides once a thread; a step that is skipped writes what was read.
template <typename W, typename G, typename S, uint N>
inline void update_elements(
    thread Elements<W, G, S, N>& x,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params) {
  if (!scalars.skip && params.stochastic != 0) {
    update_each<true>(x, scalars, params);
  } else if (!scalars.skip) {
    update_each<false>(x, scalars, params);
  }
}

// Consecutive elements, in vectors of four or one by one.
template <bool kVectors, uint N, typename T>
inline void load(const device T* from, thread T* to) {
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    to[k] = kVectors
        ? reinterpret_cast<const device metal::vec<T, 4>*>(from)[k / 4][k % 4]
        : from[k];
  }
}

template <bool kVectors, uint N, typename T>
inline void store(const thread T* from, device T* to) {
  ADADELTA_UNROLL
  for (uint k = 0; k < N; k += kVectors ? 4 : 1) {
    if (kVectors) {
      metal::vec<T, 4> x;
      for (uint j = 0; j < 4; ++j) {
        x[j] = from[k + j];
      }
      *reinterpret_cast<device metal::vec<T, 4>*>(to + k) = x;
    } else {
      to[k] = from[k];
    }
  }
}

template <bool kVectors, uint N, typename W, typename G, typename S>
inline void update_consecutive(
    const thread Arrays<W, G, S>& arrays,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params,
    uint64_t first) {
  Elements<W, G, S, N> x;
  load<kVectors, N>(arrays.w + first, x.w);
  load<kVectors, N>(arrays.g + first, x.g);
  load<kVectors, N>(arrays.v + first, x.v);
  load<kVectors, N>(arrays.u + first, x.u);
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    x.place[k] = first + k;
  }
  update_elements(x, scalars, params);
  store<kVectors, N>(x.w, arrays.w_out + first);
  store<kVectors, N>(x.v, arrays.v_out + first);
  store<kVectors, N>(x.u, arrays.u_out + first);
}

// adadelta_linear_<w>_<g>_<state>: all arrays lie alike, n elements.
//
//   buffers  0 w, 1 g, 2 v, 3 u; out 4 w, 5 v, 6 u (may be w, v and u
//            themselves); one value each: 7 lr, 8 gradient scale, 9 skip,
//            10 step; 11 params; 12 n; 13 whether every array begins at a
//            multiple of four of its elements
//   grid     ceil(n / (threads * kElementsPerThread)) threadgroups, 1-D
//   bytes    per element 2 w + 1 g + 4 state: 28 in float32, 14 in 16 bits
template <typename W, typename G, typename S>
inline void update_linear(
    const thread Arrays<W, G, S>& arrays,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params,
    uint64_t n,
    bool aligned,
    uint64_t thread_index) {
  const uint N = kElementsPerThread;
  const uint64_t first = thread_index * N;
  if (first + N > n) {
    for (uint64_t i = first; i < n; ++i) {
      update_consecutive<false, 1>(arrays, scalars, params, i);
    }
  } else if (aligned) {
    update_consecutive<true, N>(arrays, scalars, params, first);
  } else {
    update_consecutive<false, N>(arrays, scalars, params, first);
  }
}

// A threadgroup's tile; one that lies wholly in its matrix needs no bound
// check.
template <bool kWhole, typename W, typename G, typename S>
inline void update_tile(
    const thread Arrays<W, G, S>& arrays,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params,
    constant AdaDeltaTile& tile,
    threadgroup G* staged,
    uint3 first, // column, row and batch
    uint3 lane) {
  constexpr uint rows = tile_side(sizeof(G), sizeof(G));
  constexpr uint columns = tile_side(sizeof(W), sizeof(S));
  constexpr uint stride = kTileStride / sizeof(G);
  constexpr uint N = rows * columns / (kTileWidth * kTileHeight);
  Elements<W, G, S, N> x = {};
  bool inside[N];

  constexpr uint per_column = rows / kTileWidth;
  const device G* g = arrays.g +
      static_cast<int64_t>(first.z) * tile.batch_stride +
      static_cast<int64_t>(first.x + lane.y) * tile.column_stride + first.y;
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    const uint r = lane.x + k % per_column * kTileWidth;
    const uint c = lane.y + k / per_column * kTileHeight;
    if (kWhole || (first.y + r < tile.rows && first.x + c < tile.columns)) {
      x.g[k] = g[r];
    }
    if (k % per_column == per_column - 1) {
      g += kTileHeight * tile.column_stride;
    }
  }
  constexpr uint per_row = columns / kTileWidth;
  uint64_t place =
      (static_cast<uint64_t>(first.z) * tile.rows + first.y + lane.y) *
          tile.columns +
      first.x + lane.x;
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    const uint r = lane.y + k / per_row * kTileHeight;
    const uint c = lane.x + k % per_row * kTileWidth;
    inside[k] =
        kWhole || (first.y + r < tile.rows && first.x + c < tile.columns);
    x.place[k] = place + k % per_row * kTileWidth;
    if (inside[k]) {
      x.w[k] = arrays.w[x.place[k]];
      x.v[k] = arrays.v[x.place[k]];
      x.u[k] = arrays.u[x.place[k]];
    }
    if (k % per_row == per_row - 1) {
      place += kTileHeight * static_cast<uint64_t>(tile.columns);
    }
  }
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    const uint r = lane.x + k % per_column * kTileWidth;
    const uint c = lane.y + k / per_column * kTileHeight;
    staged[c * stride + r] = x.g[k];
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    const uint r = lane.y + k / per_row * kTileHeight;
    const uint c = lane.x + k % per_row * kTileWidth;
    x.g[k] = staged[c * stride + r];
  }
  update_elements(x, scalars, params);
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    if (inside[k]) {
      arrays.w_out[x.place[k]] = x.w[k];
      arrays.v_out[x.place[k]] = x.v[k];
      arrays.u_out[x.place[k]] = x.u[k];
    }
  }
}

// adadelta_tiled_<w>_<g>_<state>: w, v and u are row-contiguous (batch, rows,
// columns), each matrix of g is transposed. A threadgroup stages a tile of g
// in threadgroup memory, so that g is read along its rows and the rest along
// theirs, in whole cache lines.
//
//   buffers  0 to 11 as above; 12 tile
//   grid     (ceil(columns / tile's), ceil(rows / tile's), batch)
//            threadgroups of (kTileWidth, kTileHeight)
//   memory   the tile's columns * kTileStride bytes in threadgroup slot 0
//   bytes    as the linear kernel: g is read once
template <typename W, typename G, typename S>
inline void update_tiled(
    const thread Arrays<W, G, S>& arrays,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params,
    constant AdaDeltaTile& tile,
    threadgroup G* staged,
    uint3 group,
    uint3 lane) {
  constexpr uint rows = tile_side(sizeof(G), sizeof(G));
  constexpr uint columns = tile_side(sizeof(W), sizeof(S));
  const uint3 first = {group.x * columns, group.y * rows, group.z};
  if (first.y + rows <= tile.rows && first.x + columns <= tile.columns) {
    update_tile<true>(arrays, scalars, params, tile, staged, first, lane);
  } else {
    update_tile<false>(arrays, scalars, params, tile, staged, first, lane);
  }
}

} // namespace mlx_adadelta

using namespace mlx_adadelta;

// As MLX names them; Apple's headers have taken float16 and bfloat16.
typedef float float32_t;
typedef half float16_t;
typedef bfloat bfloat16_t;

// clang-format off
#define ADADELTA_BUFFERS(W, G, S)                                     \
  const device W##_t* w [[buffer(0)]],                                \
  const device G##_t* g [[buffer(1)]],                                \
  const device S##_t* v [[buffer(2)]],                                \
  const device S##_t* u [[buffer(3)]],                                \
  device W##_t* w_out [[buffer(4)]],                                  \
  device S##_t* v_out [[buffer(5)]],                                  \
  device S##_t* u_out [[buffer(6)]],                                  \
  const device float* lr [[buffer(7)]],                               \
  const device float* gradient_scale [[buffer(8)]],                   \
  const device bool* skip [[buffer(9)]],                              \
  const device uint64_t* step [[buffer(10)]],                         \
  constant AdaDeltaParams& params [[buffer(11)]]

#define ADADELTA_LOCALS(W, G, S)                                      \
  const Arrays<W##_t, G##_t, S##_t> arrays = {                        \
  w, g, v, u, w_out, v_out, u_out};                                   \
  const Scalars scalars = {                                           \
  lr[0], gradient_scale[0], skip[0], step[0]};

#define ADADELTA_KERNELS(W, G, S)                                     \
  [[kernel]] void adadelta_linear_##W##_##G##_##S(                    \
      ADADELTA_BUFFERS(W, G, S),                                      \
      constant uint64_t& n [[buffer(12)]],                            \
      constant uint& aligned [[buffer(13)]],                          \
      uint group [[threadgroup_position_in_grid]],                    \
      uint lane [[thread_position_in_threadgroup]],                   \
      uint lanes [[threads_per_threadgroup]]) {                       \
    ADADELTA_LOCALS(W, G, S)                                          \
    update_linear<W##_t, G##_t, S##_t>(                               \
        arrays, scalars, params, n, aligned != 0,                     \
        static_cast<uint64_t>(group) * lanes + lane);                 \
  }                                                                   \
  [[kernel]] void adadelta_tiled_##W##_##G##_##S(                     \
      ADADELTA_BUFFERS(W, G, S),                                      \
      constant AdaDeltaTile& tile [[buffer(12)]],                     \
      threadgroup G##_t* staged [[threadgroup(0)]],                   \
      uint3 group [[threadgroup_position_in_grid]],                   \
      uint3 lane [[thread_position_in_threadgroup]]) {                \
    ADADELTA_LOCALS(W, G, S)                                          \
    update_tiled<W##_t, G##_t, S##_t>(                                \
        arrays, scalars, params, tile,                                \
        staged, group, lane);                                         \
  }
// clang-format on

ADADELTA_FOR_EACH_TYPES(ADADELTA_KERNELS)
