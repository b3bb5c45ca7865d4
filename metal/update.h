// The fused AdaDelta update as the Metal kernels do it, for any types.

#ifndef MLX_ADADELTA_UPDATE_H_
#define MLX_ADADELTA_UPDATE_H_

#include "adadelta_step.h"

// A thread's elements live in registers once no index into them is left.
#define ADADELTA_UNROLL _Pragma("clang loop unroll(full)")

namespace mlx_adadelta {

// What depends on an element's type: four neighbours, which move at once but
// need no more alignment than one, and the rounding by random bits.
template <typename T>
struct Type;
template <>
struct Type<float> {
  typedef packed_float4 Four;
  static float round(float x, uint) {
    return x;
  }
};
template <>
struct Type<half> {
  typedef packed_half4 Four;
  static half round(float x, uint random) {
    return as_type<half>(static_cast<ushort>(round_to_float16(x, random)));
  }
};
template <>
struct Type<bfloat> {
  typedef packed_bfloat4 Four;
  static bfloat round(float x, uint random) {
    return as_type<bfloat>(static_cast<ushort>(round_to_bfloat16(x, random)));
  }
};

// What a kernel is given: the arrays, and what all elements share.
template <typename W, typename G, typename S>
struct Arguments {
  const device W* w;
  const device G* g;
  const device S* v;
  const device S* u;
  device W* w_out;
  device S* v_out;
  device S* u_out;
  float lr;
  float gradient_scale;
  bool skip;
  uint64_t step;
  constant AdaDeltaParams* params;
};

// Where a thread's elements lie in memory: in R runs of four neighbours. In the
// tiled kernel, also where the runs lie in the tile.
template <uint R>
struct Runs {
  uint64_t begin[R];
  uint left[R]; // elements from `begin` on, where not all are there
  uint line[R];
  uint start; // in the line
};

// A thread reads all of its elements before it writes any. So outputs may share
// memory with w, v and u, and no read waits for a write.
template <typename W, typename G, typename S, uint R>
struct Elements {
  Runs<R> runs; // of w, v and u
  Runs<R> g_runs;
  bool whole; // whether all elements are there
  typename Type<W>::Four w[R];
  typename Type<G>::Four g[R];
  typename Type<S>::Four v[R];
  typename Type<S>::Four u[R];
};

template <bool kWhole, uint R, typename T>
inline void read(
    const device T* from,
    const thread Runs<R>& runs,
    thread typename Type<T>::Four* to) {
  ADADELTA_UNROLL
  for (uint i = 0; i < R * kRun; i += kWhole ? kRun : 1) {
    const device T* run = from + runs.begin[i / kRun];
    if (kWhole) {
      to[i / kRun] =
          *reinterpret_cast<const device typename Type<T>::Four*>(run);
    } else if (i % kRun < runs.left[i / kRun]) {
      to[i / kRun][i % kRun] = run[i % kRun];
    }
  }
}

template <bool kWhole, uint R, typename T>
inline void write(
    const thread typename Type<T>::Four* from,
    const thread Runs<R>& runs,
    device T* to) {
  ADADELTA_UNROLL
  for (uint i = 0; i < R * kRun; i += kWhole ? kRun : 1) {
    device T* run = to + runs.begin[i / kRun];
    if (kWhole) {
      *reinterpret_cast<device typename Type<T>::Four*>(run) = from[i / kRun];
    } else if (i % kRun < runs.left[i / kRun]) {
      run[i % kRun] = from[i / kRun][i % kRun];
    }
  }
}

template <typename W, typename G, typename S, uint R>
inline void read_elements(
    const thread Arguments<W, G, S>& given,
    thread Elements<W, G, S, R>& x) {
  if (x.whole) {
    read<true>(given.w, x.runs, x.w);
    read<true>(given.g, x.g_runs, x.g);
    read<true>(given.v, x.runs, x.v);
    read<true>(given.u, x.runs, x.u);
  } else {
    read<false>(given.w, x.runs, x.w);
    read<false>(given.g, x.g_runs, x.g);
    read<false>(given.v, x.runs, x.v);
    read<false>(given.u, x.runs, x.u);
  }
}

template <typename W, typename G, typename S, uint R>
inline void write_elements(
    const thread Elements<W, G, S, R>& x,
    const thread Arguments<W, G, S>& given) {
  if (x.whole) {
    write<true>(x.w, x.runs, given.w_out);
    write<true>(x.v, x.runs, given.v_out);
    write<true>(x.u, x.runs, given.u_out);
  } else {
    write<false>(x.w, x.runs, given.w_out);
    write<false>(x.v, x.runs, given.v_out);
    write<false>(x.u, x.runs, given.u_out);
  }
}

template <bool kStochastic, typename W, typename G, typename S, uint R>
inline void update_each(
    thread Elements<W, G, S, R>& x,
    const thread Arguments<W, G, S>& given) {
  const RandomKeys keys = adadelta_keys(given.step, *given.params);
  ADADELTA_UNROLL
  for (uint i = 0; i < R * kRun; ++i) {
    const uint r = i / kRun;
    const uint k = i % kRun;
    const AdaDeltaState<float> next = adadelta_step<float>(
        static_cast<float>(x.w[r][k]),
        static_cast<float>(x.g[r][k]),
        static_cast<float>(x.v[r][k]),
        static_cast<float>(x.u[r][k]),
        given.lr,
        given.gradient_scale,
        *given.params);
    if (kStochastic) {
      // 64 bits once a run: its elements only carry into the high word.
      const uint begin = static_cast<uint>(x.runs.begin[r]);
      const uint high = static_cast<uint>(x.runs.begin[r] >> 32);
      const uint low = begin + k;
      const uint hash =
          hash_place(add_high(keys.place, high), low, low < begin);
      x.w[r][k] = Type<W>::round(next.w, keys.w + hash * kFactorW);
      x.v[r][k] = Type<S>::round(next.v, keys.v + hash * kFactorV);
      x.u[r][k] = Type<S>::round(next.u, keys.u + hash * kFactorU);
    } else {
      x.w[r][k] = static_cast<W>(next.w);
      x.v[r][k] = static_cast<S>(next.v);
      x.u[r][k] = static_cast<S>(next.u);
    }
  }
}

// Decides once a thread. A step that is skipped writes the values it read.
template <typename W, typename G, typename S, uint R>
inline void update_elements(
    thread Elements<W, G, S, R>& x,
    const thread Arguments<W, G, S>& given) {
  if (!given.skip && given.params->stochastic != 0) {
    update_each<true>(x, given);
  } else if (!given.skip) {
    update_each<false>(x, given);
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
    const thread Arguments<W, G, S>& given,
    uint64_t n,
    uint group,
    uint lane,
    uint lanes) {
  constexpr uint N = kElementsPerThread;
  const uint64_t begin = static_cast<uint64_t>(group) * lanes * N + lane * N;
  Elements<W, G, S, N / kRun> x = {};
  x.whole = begin + N <= n;
  ADADELTA_UNROLL
  for (uint r = 0; r < N / kRun; ++r) {
    const uint64_t at = begin + r * kRun;
    x.runs.begin[r] = x.g_runs.begin[r] = at;
    x.runs.left[r] = x.g_runs.left[r] =
        !x.whole && at < n ? static_cast<uint>(n - at) : 0;
  }
  read_elements(given, x);
  update_elements(x, given);
  write_elements(x, given);
}

// Finds a thread's runs in a tile with lines of kSide elements. In memory the
// lines lie `stride` apart from `begin` on; of the matrix there are so many
// lines left, and so many elements of each.
template <uint kSide, uint R>
inline void find_runs(
    uint lane,
    uint64_t begin,
    uint64_t stride,
    uint lines,
    uint elements,
    thread Runs<R>& runs) {
  constexpr uint runs_of_line = kSide / kRun;
  const uint line = lane / runs_of_line;
  runs.start = lane % runs_of_line * kRun;
  begin += line * stride + runs.start;
  ADADELTA_UNROLL
  for (uint r = 0; r < R; ++r) {
    runs.line[r] = line + r * (kTileThreads / runs_of_line);
    runs.begin[r] = begin;
    const bool inside = runs.line[r] < lines && runs.start < elements;
    runs.left[r] = inside ? elements - runs.start : 0;
    begin += kTileThreads / runs_of_line * stride;
  }
}

// adadelta_tiled_<w>_<g>_<state>: w, v and u are row-contiguous (batch, rows,
// columns), each matrix of g is transposed. A threadgroup turns a tile of g in
// its memory, so that all is read along its rows, in whole cache lines.
//
//   buffers  0 to 11 as above; 12 tile
//   grid     (ceil(columns / tile's), ceil(rows / tile's), batch)
//            threadgroups of kTileThreads
//   memory   the tile's columns * kTileStride bytes in threadgroup slot 0
//   bytes    as the linear kernel: g is read once
template <typename W, typename G, typename S>
inline void update_tiled(
    const thread Arguments<W, G, S>& given,
    AdaDeltaTile tile,
    threadgroup G* staged,
    uint3 group,
    uint lane) {
  constexpr uint rows = tile_side(sizeof(G), sizeof(G));
  constexpr uint columns = tile_side(sizeof(W), sizeof(S));
  constexpr uint stride = kTileStride / sizeof(G);
  constexpr uint R = rows * columns / (kTileThreads * kRun);
  const uint row = group.y * rows;
  const uint column = group.x * columns;
  const uint rows_left = tile.rows - row;
  const uint columns_left = tile.columns - column;

  Elements<W, G, S, R> x = {};
  x.whole = rows_left >= rows && columns_left >= columns;
  find_runs<columns>(
      lane,
      (group.z * uint64_t{tile.rows} + row) * tile.columns + column,
      tile.columns,
      rows_left,
      columns_left,
      x.runs);
  find_runs<rows>(
      lane,
      group.z * tile.batch_stride + column * tile.column_stride + row,
      tile.column_stride,
      columns_left,
      rows_left,
      x.g_runs);
  read_elements(given, x);
  ADADELTA_UNROLL
  for (uint i = 0; i < R * kRun; ++i) {
    const uint r = x.g_runs.start + i % kRun;
    staged[x.g_runs.line[i / kRun] * stride + r] = x.g[i / kRun][i % kRun];
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  ADADELTA_UNROLL
  for (uint i = 0; i < R * kRun; ++i) {
    const uint c = x.runs.start + i % kRun;
    x.g[i / kRun][i % kRun] = staged[c * stride + x.runs.line[i / kRun]];
  }
  update_elements(x, given);
  write_elements(x, given);
}

} // namespace mlx_adadelta

#endif // MLX_ADADELTA_UPDATE_H_
