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
  static T stochastic(float x, uint) {
    return x;
  }
};

template <>
inline half Round<half>::stochastic(float x, uint random) {
  return as_type<half>(static_cast<ushort>(round_to_float16(x, random)));
}

template <>
inline bfloat Round<bfloat>::stochastic(float x, uint random) {
  return as_type<bfloat>(static_cast<ushort>(round_to_bfloat16(x, random)));
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
// may share memory with w, v and u, and that no read waits for a write.
template <typename W, typename G, typename S, uint N>
struct Elements {
  W w[N];
  G g[N];
  S v[N];
  S u[N];
};

// Where they lie in memory, and whether they are there.
template <uint N>
struct Places {
  uint64_t at[N];
  bool inside[N];
};

template <bool kStochastic, typename W, typename G, typename S, uint N>
inline void update_each(
    thread Elements<W, G, S, N>& x,
    const thread Places<N>& places,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params) {
  const RandomKeys keys = adadelta_keys(scalars.step, params);
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
      const uint hash = hash_place(
          keys.place,
          static_cast<uint>(places.at[k]),
          static_cast<uint>(places.at[k] >> 32));
      x.w[k] = Round<W>::stochastic(next.w, keys.w + hash * kFactorW);
      x.v[k] = Round<S>::stochastic(next.v, keys.v + hash * kFactorV);
      x.u[k] = Round<S>::stochastic(next.u, keys.u + hash * kFactorU);
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
    const thread Places<N>& places,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params) {
  if (!scalars.skip && params.stochastic != 0) {
    update_each<true>(x, places, scalars, params);
  } else if (!scalars.skip) {
    update_each<false>(x, places, scalars, params);
  }
}

// How elements are read and written: each where it is inside, all of them, or
// all in vectors of four that lie side by side.
constexpr constant uint kInside = 0, kAll = 1, kVectors = 4;

template <uint kHow, uint N, typename T>
inline void
read(const device T* from, const thread Places<N>& places, thread T* to) {
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    if (kHow == kVectors) {
      to[k] = (*reinterpret_cast<const device metal::vec<T, 4>*>(
          from + places.at[k / 4 * 4]))[k % 4];
    } else if (kHow == kAll || places.inside[k]) {
      to[k] = from[places.at[k]];
    }
  }
}

template <uint kHow, uint N, typename T>
inline void
write(const thread T* from, const thread Places<N>& places, device T* to) {
  metal::vec<T, 4> x;
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    if (kHow == kVectors) {
      x[k % 4] = from[k];
      if (k % 4 == 3) {
        *reinterpret_cast<device metal::vec<T, 4>*>(to + places.at[k - 3]) = x;
      }
    } else if (kHow == kAll || places.inside[k]) {
      to[places.at[k]] = from[k];
    }
  }
}

template <uint kHow, typename W, typename G, typename S, uint N>
inline void read_elements(
    const thread Arrays<W, G, S>& arrays,
    const thread Places<N>& places,
    const thread Places<N>& g_places,
    thread Elements<W, G, S, N>& x) {
  read<kHow>(arrays.w, places, x.w);
  read<kHow>(arrays.g, g_places, x.g);
  read<kHow>(arrays.v, places, x.v);
  read<kHow>(arrays.u, places, x.u);
}

template <uint kHow, typename W, typename G, typename S, uint N>
inline void write_elements(
    const thread Elements<W, G, S, N>& x,
    const thread Places<N>& places,
    const thread Arrays<W, G, S>& arrays) {
  write<kHow>(x.w, places, arrays.w_out);
  write<kHow>(x.v, places, arrays.v_out);
  write<kHow>(x.u, places, arrays.u_out);
}

// adadelta_linear_<w>_<g>_<state>: all arrays lie alike, n elements.
//
//   buffers  0 w, 1 g, 2 v, 3 u; out 4 w, 5 v, 6 u (may be w, v and u
//            themselves); one value each: 7 lr, 8 gradient scale, 9 skip,
//            10 step; 11 params; 12 n; 13 whether vectors of four elements
//            may be read and written at each array's address
//   grid     ceil(n / (threads * kElementsPerThread)) threadgroups, 1-D
//   bytes    per element 2 w + 1 g + 4 state: 28 in float32, 14 in 16 bits
template <typename W, typename G, typename S>
inline void update_linear(
    const thread Arrays<W, G, S>& arrays,
    const thread Scalars& scalars,
    constant AdaDeltaParams& params,
    uint64_t n,
    bool aligned,
    uint group,
    uint lane,
    uint lanes) {
  constexpr uint N = kElementsPerThread;
  const uint64_t begin = static_cast<uint64_t>(group) * lanes * N;
  const bool vectors = aligned && begin + lanes * N <= n;
  Places<N> places;
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    places.at[k] = begin + (vectors ? lane * N + k : k * lanes + lane);
    places.inside[k] = places.at[k] < n;
  }
  Elements<W, G, S, N> x = {};
  if (vectors) {
    read_elements<kVectors>(arrays, places, places, x);
  } else {
    read_elements<kInside>(arrays, places, places, x);
  }
  update_elements(x, places, scalars, params);
  if (vectors) {
    write_elements<kVectors>(x, places, arrays);
  } else {
    write_elements<kInside>(x, places, arrays);
  }
}

// adadelta_tiled_<w>_<g>_<state>: w, v and u are row-contiguous (batch, rows,
// columns), each matrix of g is transposed. A threadgroup turns a tile of g in
// its memory, so that all is read along its rows, in whole cache lines.
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
  constexpr uint stride = kTileStride / sizeof(G);
  constexpr uint N = rows * columns / (kTileWidth * kTileHeight);
  constexpr uint in_column = rows / kTileWidth; // elements of a thread
  constexpr uint in_row = columns / kTileWidth;
  const uint row = group.y * rows;
  const uint column = group.x * columns;

  Places<N> g_places;
  int64_t g_at = group.z * tile.batch_stride +
      static_cast<int64_t>(column + lane.y) * tile.column_stride + row;
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    const uint r = lane.x + k % in_column * kTileWidth;
    const uint c = lane.y + k / in_column * kTileHeight;
    g_places.at[k] = g_at + r;
    g_places.inside[k] = row + r < tile.rows && column + c < tile.columns;
    if (k % in_column == in_column - 1) {
      g_at += kTileHeight * tile.column_stride;
    }
  }
  Places<N> places;
  uint64_t at = (static_cast<uint64_t>(group.z) * tile.rows + row + lane.y) *
          tile.columns +
      column;
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    const uint r = lane.y + k / in_row * kTileHeight;
    const uint c = lane.x + k % in_row * kTileWidth;
    places.at[k] = at + c;
    places.inside[k] = row + r < tile.rows && column + c < tile.columns;
    if (k % in_row == in_row - 1) {
      at += kTileHeight * static_cast<uint64_t>(tile.columns);
    }
  }

  Elements<W, G, S, N> x = {};
  const bool whole =
      row + rows <= tile.rows && column + columns <= tile.columns;
  if (whole) {
    read_elements<kAll>(arrays, places, g_places, x);
  } else {
    read_elements<kInside>(arrays, places, g_places, x);
  }
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    const uint r = lane.x + k % in_column * kTileWidth;
    const uint c = lane.y + k / in_column * kTileHeight;
    staged[c * stride + r] = x.g[k];
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  ADADELTA_UNROLL
  for (uint k = 0; k < N; ++k) {
    const uint r = lane.y + k / in_row * kTileHeight;
    const uint c = lane.x + k % in_row * kTileWidth;
    x.g[k] = staged[c * stride + r];
  }
  update_elements(x, places, scalars, params);
  if (whole) {
    write_elements<kAll>(x, places, arrays);
  } else {
    write_elements<kInside>(x, places, arrays);
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
        arrays, scalars, params, n,                                   \
        aligned != 0, group, lane, lanes);                            \
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
