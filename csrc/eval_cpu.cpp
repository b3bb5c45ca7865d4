#include <algorithm>
#include <atomic>
#include <future>
#include <thread>

#include "adadelta.h"
#include "layout.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/threadpool.h"
#include "mlx/types/half_types.h"

// One binary serves every x86-64: the loops are compiled for each vector width
// and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define ADADELTA_CLONES \
  __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ADADELTA_CLONES
#endif

// An output may be its own input, element for element, which a vector loop
// bears; without a word about it the compiler would take the scalar path.
#if defined(__clang__)
#define ADADELTA_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ADADELTA_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

using float32_t = float;

// A thread takes this many elements at a time ...
constexpr size_t kUnit = 1 << 16;
// ... and below this many a second thread costs more than it saves.
constexpr size_t kParallel = 1 << 17;
// A transposed operand is turned this many elements square at a time.
constexpr size_t kTile = 64;
constexpr size_t kTilePadding = 16; // keeps its columns in distinct cache sets

template <typename W, typename G, typename S>
struct Pointers {
  const W* w;
  const G* g;
  const S* v;
  const S* u;
  W* w_out;
  S* v_out;
  S* u_out;

  Pointers at(size_t i) const {
    return {w + i, g + i, v + i, u + i, w_out + i, v_out + i, u_out + i};
  }
};

template <typename W, typename G, typename S>
ADADELTA_CLONES void
update_linear(Pointers<W, G, S> p, size_t n, float lr, AdaDeltaParams params) {
  ADADELTA_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    auto next =
        adadelta_step<float>(p.w[i], p.g[i], p.v[i], p.u[i], lr, params);
    p.w_out[i] = static_cast<W>(next.w);
    p.v_out[i] = static_cast<S>(next.v);
    p.u_out[i] = static_cast<S>(next.u);
  }
}

// A square of a transposed operand, turned to lie as the parameter does.
template <typename T>
struct Turned {
  static constexpr size_t kStride = kTile + kTilePadding;
  T elements[kTile * kStride];

  void turn(const T* from, long column_stride, size_t rows, size_t columns) {
    for (size_t c = 0; c < columns; ++c) {
      for (size_t r = 0; r < rows; ++r) {
        elements[r * kStride + c] = from[c * column_stride + r];
      }
    }
  }
};

// One parameter's update, cut into units that may run in any order.
struct Work {
  size_t elements;
  size_t units;
  std::function<void(size_t unit)> run;
};

template <typename W, typename G, typename S>
Work linear_work(
    Pointers<W, G, S> p,
    size_t n,
    const float* lr,
    AdaDeltaParams params) {
  auto run = [=](size_t unit) {
    size_t begin = unit * kUnit;
    update_linear(p.at(begin), std::min(kUnit, n - begin), *lr, params);
  };
  return {n, (n + kUnit - 1) / kUnit, run};
}

template <typename W, typename G, typename S>
Work tiled_work(
    Pointers<W, G, S> p,
    size_t n,
    AdaDeltaTile g_tile,
    AdaDeltaTile v_tile,
    AdaDeltaTile u_tile,
    size_t rows,
    size_t columns,
    const float* lr,
    AdaDeltaParams params) {
  size_t strips = (rows + kTile - 1) / kTile;
  auto run = [=](size_t unit) {
    Turned<G> g;
    Turned<S> v;
    Turned<S> u;
    size_t batch = unit / strips;
    size_t row = unit % strips * kTile;
    size_t height = std::min(kTile, rows - row);
    for (size_t column = 0; column < columns; column += kTile) {
      size_t width = std::min(kTile, columns - column);
      auto turn = [&](auto& turned, const auto* from, const AdaDeltaTile& t) {
        if (t.rows != 0) {
          from += batch * t.batch_stride + row + column * t.column_stride;
          turned.turn(from, t.column_stride, height, width);
        }
      };
      turn(g, p.g, g_tile);
      turn(v, p.v, v_tile);
      turn(u, p.u, u_tile);
      for (size_t r = 0; r < height; ++r) {
        auto line = p.at((batch * rows + row + r) * columns + column);
        if (g_tile.rows != 0) {
          line.g = g.elements + r * g.kStride;
        }
        if (v_tile.rows != 0) {
          line.v = v.elements + r * v.kStride;
        }
        if (u_tile.rows != 0) {
          line.u = u.elements + r * u.kStride;
        }
        update_linear(line, width, *lr, params);
      }
    }
  };
  return {n, n / (rows * columns) * strips, run};
}

template <typename W, typename G, typename S>
Work make_work(
    const Operands& x,
    array* outputs,
    const float* lr,
    AdaDeltaParams params) {
  Pointers<W, G, S> p{
      x.w.source.data<W>(),
      x.g.source.data<G>(),
      x.v.source.data<S>(),
      x.u.source.data<S>(),
      outputs[0].data<W>(),
      outputs[1].data<S>(),
      outputs[2].data<S>()};
  size_t n = outputs[0].size();
  const auto& tile = x.tile();
  if (tile.rows == 0) {
    return linear_work(p, n, lr, params);
  }
  return tiled_work(
      p, n, x.g.tile, x.v.tile, x.u.tile, tile.rows, tile.columns, lr, params);
}

// In the order of ADADELTA_FOR_EACH_TYPES.
#define ADADELTA_WORK(W, G, S) make_work<W##_t, G##_t, S##_t>,
constexpr decltype(&make_work<float, float, float>) work_makers[] = {
    ADADELTA_FOR_EACH_TYPES(ADADELTA_WORK)};
#undef ADADELTA_WORK

// The threads beside the stream's own. Never joined: a stream may still run
// when static objects are destroyed.
ThreadPool& helpers() {
  static auto* pool =
      new ThreadPool(std::max(1u, std::thread::hardware_concurrency()) - 1);
  return *pool;
}

size_t helper_count(size_t elements) {
  size_t threads = std::max(1u, std::thread::hardware_concurrency());
  return std::min(threads - 1, elements / kParallel);
}

void run_all(const std::vector<Work>& group) {
  size_t elements = 0;
  size_t units = 0;
  for (const auto& work : group) {
    elements += work.elements;
    units += work.units;
  }
  std::atomic<size_t> next{0};
  auto take_units = [&] {
    auto work = group.begin();
    size_t first = 0; // the number of work's first unit
    for (size_t i = next++; i < units; i = next++) {
      while (i - first >= work->units) {
        first += work->units;
        ++work;
      }
      work->run(i - first);
    }
  };
  std::vector<std::future<void>> helping;
  for (size_t i = helper_count(elements); i > 0; --i) {
    helping.push_back(helpers().enqueue(take_units));
  }
  take_units();
  for (auto& helper : helping) {
    helper.wait();
  }
}

} // namespace

void AdaDeltaUpdate::eval_cpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  Evaluation evaluation(inputs, outputs, /* transposed_state */ true);
  auto& encoder = cpu::get_command_encoder(stream());
  evaluation.make_copies(
      stream(), [&](array copy) { encoder.add_temporary(std::move(copy)); });
  evaluation.place_outputs();
  // Shared, because MLX copies the task several times on its way.
  auto group = std::make_shared<std::vector<Work>>();
  for (size_t i = 0; i < evaluation.operands().size(); ++i) {
    const auto& x = evaluation.operands()[i];
    int types =
        find_types(x.w.source.dtype(), x.g.source.dtype(), x.v.source.dtype());
    group->push_back(
        work_makers[types](
            x, &outputs[3 * i], inputs[0].data<float>(), params_));
  }
  encoder.dispatch([group = std::move(group)] { run_all(*group); });
  evaluation.finish();
}

} // namespace mlx_adadelta
