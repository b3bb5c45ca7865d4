// The update where only the kernel sees how the gradient lies: MLX runs this
// through mx.fast.metal_kernel, where the package's extension does not fit it.

#ifndef MLX_ADADELTA_ANY_LAYOUT_H_
#define MLX_ADADELTA_ANY_LAYOUT_H_

#include "update.h"

namespace mlx_adadelta {

struct Axis {
  int64_t length;
  int64_t stride;
};

// The axes of a gradient that are longer than one, neighbours merged where one
// stride serves: the last three, and whether there are more.
struct Axes {
  Axis batch;
  Axis rows;
  Axis columns;
  bool more;
};

inline void merge_axes(
    const constant int* shape,
    const constant int64_t* strides,
    int n,
    thread Axes& axes) {
  for (int i = 0; i < n; ++i) {
    const Axis next = {shape[i], strides[i]};
    if (next.length == 1) {
      continue;
    }
    if (axes.columns.length > 1 &&
        axes.columns.stride == next.length * next.stride) {
      axes.columns.length *= next.length;
      axes.columns.stride = next.stride;
    } else {
      axes.more = axes.more || axes.batch.length > 1;
      axes.batch = axes.rows;
      axes.rows = axes.columns;
      axes.columns = next;
    }
  }
}

inline bool is_linear(const thread Axes& axes) {
  return axes.rows.length == 1 && axes.columns.stride == 1;
}

// Whether each matrix is transposed, in numbers that a tile can hold.
inline bool is_transposed(const thread Axes& axes) {
  return !axes.more && axes.rows.length > 1 && axes.rows.stride == 1 &&
      axes.columns.stride >= axes.rows.length &&
      (axes.batch.length == 1 || axes.batch.stride > 0) &&
      ((axes.rows.length | axes.columns.length) >> 32) == 0;
}

// Where the i-th element lies, in row-major order.
inline int64_t place_of(
    uint64_t i,
    const constant int* shape,
    const constant int64_t* strides,
    int n) {
  int64_t place = 0;
  for (int axis = n - 1; axis >= 0; --axis) {
    place += static_cast<int64_t>(i % shape[axis]) * strides[axis];
    i /= shape[axis];
  }
  return place;
}

// Each element of the gradient is looked up: a run has one element.
template <typename W, typename G, typename S>
inline void update_strided(
    const thread Arguments<W, G, S>& given,
    const constant int* shape,
    const constant int64_t* strides,
    int ndim,
    uint64_t n,
    uint group,
    uint lane) {
  constexpr uint R = kElementsPerThread;
  const uint64_t begin = (static_cast<uint64_t>(group) * kThreads + lane) * R;
  Elements<W, G, S, R> x = {};
  ADADELTA_UNROLL
  for (uint r = 0; r < R; ++r) {
    x.runs.begin[r] = begin + r;
    x.g_runs.begin[r] =
        static_cast<uint64_t>(place_of(begin + r, shape, strides, ndim));
    x.runs.left[r] = x.g_runs.left[r] = begin + r < n ? 1 : 0;
  }
  read_elements(given, x);
  update_elements(x, given);
  write_elements(x, given);
}

// w, v, u and the outputs are row-contiguous, g lies anyhow: it is read in
// place, along its own rows where it is transposed.
//
//   grid     so many threadgroups of kThreads that each thread has
//            kElementsPerThread elements, 1-D. Where g is transposed, a
//            threadgroup takes one tile after another.
//   memory   in threadgroup memory as the tiled kernel
static_assert(kThreads == kTileThreads, "one threadgroup serves both");
template <typename W, typename G, typename S>
inline void update_any(
    const thread Arguments<W, G, S>& given,
    const constant int* shape,
    const constant int64_t* strides,
    int ndim,
    threadgroup G* staged,
    uint group,
    uint groups,
    uint lane) {
  uint64_t n = 1;
  for (int i = 0; i < ndim; ++i) {
    n *= shape[i];
  }
  Axes axes = {{1, 0}, {1, 0}, {1, 0}, false};
  merge_axes(shape, strides, ndim, axes);
  if (is_linear(axes)) {
    update_linear(given, n, group, lane, kThreads);
    return;
  }
  if (!is_transposed(axes)) {
    update_strided(given, shape, strides, ndim, n, group, lane);
    return;
  }
  constexpr uint rows = tile_side(sizeof(G), sizeof(G));
  constexpr uint columns = tile_side(sizeof(W), sizeof(S));
  const uint64_t down = (axes.rows.length + rows - 1) / rows;
  const uint64_t across = (axes.columns.length + columns - 1) / columns;
  const uint64_t tiles = down * across * axes.batch.length;
  for (uint64_t i = group; i < tiles; i += groups) {
    const uint3 place = {
        static_cast<uint>(i % across),
        static_cast<uint>(i / across % down),
        static_cast<uint>(i / across / down)};
    // The tile before may still be read.
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    update_tiled<W, G, S>(
        given,
        {axes.batch.stride,
         axes.columns.stride,
         static_cast<uint>(axes.rows.length),
         static_cast<uint>(axes.columns.length)},
        staged,
        place,
        lane);
  }
}

} // namespace mlx_adadelta

#endif // MLX_ADADELTA_ANY_LAYOUT_H_
