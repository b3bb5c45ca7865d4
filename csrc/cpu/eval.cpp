#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "adadelta.h"
#include "layout.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/threadpool.h"
#include "mlx/types/half_types.h"

// One binary serves every x86-64: the loops are compiled for each vector width
// and chosen when the library is loaded. A build may define it away: sanitizers
// start too late for the choice.
#ifdef ADADELTA_CLONES
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define ADADELTA_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ADADELTA_CLONES
#endif

// What a cloned loop calls must be part of it.
#define ADADELTA_INLINE inline __attribute__((always_inline))
#define ADADELTA_INLINE_LAMBDA __attribute__((always_inline))

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

constexpr size_t kCacheLine = 64;
// A thread takes this many elements at a time ...
constexpr size_t kUnit = 1 << 16;
// ... and below this many a second thread costs more than it saves.
constexpr size_t kParallel = 1 << 17;

// ------------------------------- Conversions --------------------------------

template <typename T>
ADADELTA_INLINE float widen(T x) {
  return static_cast<float>(x);
}

template <typename T>
ADADELTA_INLINE T narrow(float x) {
  return static_cast<T>(x);
}

// MLX's own conversions branch, which keeps a loop scalar. These give the same
// bits, NaN included, without. Where the hardware has the type, MLX and the
// compiler use it.
#ifndef __ARM_FEATURE_FP16_SCALAR_ARITHMETIC
ADADELTA_INLINE float widen(float16_t x) {
  uint32_t magnitude = uint32_t(x.bits_ & 0x7fff) << 13;
  uint32_t sign = uint32_t(x.bits_ & 0x8000) << 16;
  float normal = float_of(magnitude + (0xe0u << 23)) * 0x1p-112f;
  float subnormal = float_of((magnitude >> 13) | (126u << 23)) - 0.5f;
  bool is_normal = magnitude >= (1u << 23);
  return float_of(sign | (is_normal ? bits_of(normal) : bits_of(subnormal)));
}

template <>
ADADELTA_INLINE float16_t narrow<float16_t>(float x) {
  uint32_t magnitude = bits_of(x) & 0x7fffffff;
  uint32_t sign = (bits_of(x) >> 16) & 0x8000;
  // Adding a power of two rounds where half's last bit is; too large a value
  // becomes infinite on the way.
  uint32_t power = std::max(magnitude & 0x7f800000, 0x38800000u) + (15u << 23);
  float scaled = float_of(magnitude) * 0x1p112f * 0x1p-110f;
  uint32_t sum = bits_of(float_of(power) + scaled);
  uint32_t rounded = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  float16_t y;
  y.bits_ = sign | (magnitude > 0x7f800000 ? 0x7d00 : rounded);
  return y;
}
#endif

#ifndef __ARM_FEATURE_BF16
ADADELTA_INLINE float widen(bfloat16_t x) {
  return float_of(uint32_t(x.bits_) << 16);
}

template <>
ADADELTA_INLINE bfloat16_t narrow<bfloat16_t>(float x) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + ((bits >> 16) & 1) + 0x7fff) >> 16;
  bfloat16_t y;
  y.bits_ = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
  return y;
}
#endif

// Rounds stochastically, with these bits.
template <typename T>
ADADELTA_INLINE T narrow(float x, uint32_t random) {
  if constexpr (std::is_same_v<T, float16_t>) {
    return std::bit_cast<T>(static_cast<uint16_t>(round_to_float16(x, random)));
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    return std::bit_cast<T>(
        static_cast<uint16_t>(round_to_bfloat16(x, random)));
  } else {
    return x;
  }
}

// ------------------------------- Linear loop --------------------------------

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

// What all elements share.
struct Shared {
  float lr;
  float gradient_scale;
  bool skip;
  uint64_t step;
  AdaDeltaParams params;
};

// Where they are found when the stream gets there.
struct SharedInputs {
  const float* lr;
  const float* gradient_scale;
  const bool* skip;
  const uint64_t* step;
  AdaDeltaParams params;

  Shared read() const {
    return {*lr, *gradient_scale, *skip, *step, params};
  }
};

// Updates elements begin to end of p, which starts at the parameter's element
// `first`.
template <typename W, typename G, typename S>
ADADELTA_INLINE void update(
    const Pointers<W, G, S>& p,
    size_t begin,
    size_t end,
    size_t first,
    const Shared& shared) {
  const auto params = shared.params;
  if (shared.skip) {
    std::copy(p.w + begin, p.w + end, p.w_out + begin);
    std::copy(p.v + begin, p.v + end, p.v_out + begin);
    std::copy(p.u + begin, p.u + end, p.u_out + begin);
    return;
  }
  auto next = [&](size_t i) ADADELTA_INLINE_LAMBDA {
    return adadelta_step<float>(
        widen(p.w[i]),
        widen(p.g[i]),
        widen(p.v[i]),
        widen(p.u[i]),
        shared.lr,
        shared.gradient_scale,
        params);
  };
  if (params.stochastic == 0) {
    ADADELTA_INDEPENDENT
    for (size_t i = begin; i < end; ++i) {
      auto state = next(i);
      p.w_out[i] = narrow<W>(state.w);
      p.v_out[i] = narrow<S>(state.v);
      p.u_out[i] = narrow<S>(state.u);
    }
  } else {
    auto keys = adadelta_keys(shared.step, params);
    ADADELTA_INDEPENDENT
    for (size_t i = begin; i < end; ++i) {
      auto state = next(i);
      uint64_t place = first + i;
      auto hash = hash_place(
          keys.place,
          static_cast<uint32_t>(place),
          static_cast<uint32_t>(place >> 32));
      p.w_out[i] = narrow<W>(state.w, keys.w + hash * kFactorW);
      p.v_out[i] = narrow<S>(state.v, keys.v + hash * kFactorV);
      p.u_out[i] = narrow<S>(state.u, keys.u + hash * kFactorU);
    }
  }
}

template <typename W, typename G, typename S>
ADADELTA_CLONES void
update_linear(Pointers<W, G, S> p, size_t n, size_t first, Shared shared) {
  update(p, 0, n, first, shared);
}

// ---------------------------- Transposed operands ---------------------------

// The transposed operands of a strip of rows are turned into a buffer block by
// block, each between two pieces of the strip before: a core waits for memory
// longer than it computes, so that the turning is nearly free.

// A strip's part of a column is two cache lines; one wastes half of what the
// hardware fetches, four do not pay for the larger buffer.
constexpr size_t kStripBytes = 2 * kCacheLine;
// All operands' strips have the gradient's rows, whatever their own types.
template <typename G>
constexpr size_t kStripRows = kStripBytes / sizeof(G);
// Rows are cut only beyond this, where two strips outgrow the L2 cache: the
// hardware prefetches far across each cut.
constexpr size_t kStripColumns = 4096;
constexpr size_t kBlock = 8; // turned in registers
constexpr size_t kPiece = 64; // elements updated after each block
// How far ahead to ask for memory: the interleaved accesses confuse the
// hardware's own prefetching.
constexpr size_t kAheadColumns = 32;
constexpr size_t kAhead = 512;
// A thread takes about this many elements of strips at a time: the first strip
// is turned with nothing to hide behind.
constexpr size_t kStripsUnit = 1 << 17;

template <typename T>
ADADELTA_INLINE void prefetch(const T* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2); // to L2: columns a power of two apart evict one
                               // another from L1
#endif
}

// to[r * to_stride + c] = from[c * from_stride + r], rows and columns < kBlock.
template <typename T>
ADADELTA_INLINE void
turn_block(const T* from, long from_stride, T* to, size_t to_stride) {
#if __has_builtin(__builtin_shufflevector)
  using Lane = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  typedef Lane Vector __attribute__((vector_size(kBlock * sizeof(T))));
  Vector a[kBlock];
  Vector b[kBlock];
  for (size_t i = 0; i < kBlock; ++i) {
    std::memcpy(&a[i], from + i * from_stride, sizeof(Vector));
  }
  // Pairs, then quadruples, within 128 bits; then halves.
  for (size_t i = 0; i < kBlock; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] =
        __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (size_t i = 0; i < kBlock; i += 4) {
    for (size_t j = 0; j < 2; ++j) {
      auto& x = b[i + j];
      auto& y = b[i + j + 2];
      a[i + 2 * j] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] =
          __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (size_t i = 0; i < 4; ++i) {
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] =
        __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (size_t i = 0; i < kBlock; ++i) {
    std::memcpy(to + i * to_stride, &b[i], sizeof(Vector));
  }
#else
  for (size_t c = 0; c < kBlock; ++c) {
    for (size_t r = 0; r < kBlock; ++r) {
      to[r * to_stride + c] = from[c * from_stride + r];
    }
  }
#endif
}

// An operand in strips of rows: one strip turned, to be read, and the next one
// being turned. Does nothing where the operand lies as the parameter does.
template <typename T, size_t strip_rows>
class Turned {
 public:
  // from: the operand's element (0, 0) of the columns in question.
  Turned(const T* from, const AdaDeltaTile& tile, size_t columns, void* buffer)
      : from_(from),
        stride_(tile.column_stride),
        columns_(tile.rows != 0 ? columns : 0),
        to_stride_(padded(columns)),
        askew_(stride_ * sizeof(T) % kCacheLine != 0),
        strip_(static_cast<T*>(buffer)),
        next_(strip_ + strip_rows * to_stride_) {}

  static size_t buffer_bytes(size_t columns) {
    return 2 * strip_rows * padded(columns) * sizeof(T);
  }

  // The strip turned last is now to be read, the one of these rows is turned.
  ADADELTA_INLINE void advance(size_t begin, size_t end) {
    std::swap(strip_, next_);
    source_ = from_ + begin;
    rows_ = end - begin;
    row_ = 0;
    column_ = rows_ != 0 ? 0 : columns_;
  }

  ADADELTA_INLINE void turn_one_block() {
    if (column_ >= columns_) {
      return;
    }
    const T* from = source_ + column_ * stride_ + row_;
    T* to = next_ + row_ * to_stride_ + column_;
    if (row_ + kBlock <= rows_ && column_ + kBlock <= columns_) {
      if (column_ + kAheadColumns + kBlock <= columns_) {
        // Its share of the cache lines that this row of blocks lies in.
        constexpr size_t share = kBlock * kBlock * sizeof(T) / kCacheLine;
        size_t row = row_ % (kCacheLine / sizeof(T));
        const T* ahead =
            from - row + (kAheadColumns + row / kBlock * share) * stride_;
        for (size_t c = 0; c < share; ++c) {
          prefetch(ahead + c * stride_);
        }
        if (askew_ && row_ + 2 * kBlock > rows_) {
          for (size_t c = 0; c < kBlock; ++c) {
            prefetch(from + (c + kAheadColumns) * stride_ + kBlock - 1);
          }
        }
      }
      turn_block(from, stride_, to, to_stride_);
    } else {
      for (size_t c = 0; c < std::min(kBlock, columns_ - column_); ++c) {
        for (size_t r = 0; r < std::min(kBlock, rows_ - row_); ++r) {
          to[r * to_stride_ + c] = from[c * stride_ + r];
        }
      }
    }
    row_ += kBlock;
    if (row_ >= rows_) {
      row_ = 0;
      column_ += kBlock;
    }
  }

  ADADELTA_INLINE void turn_the_rest() {
    while (column_ < columns_) {
      turn_one_block();
    }
  }

  // The strip's row, or the row itself of an operand that needs no turning.
  ADADELTA_INLINE const T* row(size_t i, const T* same) const {
    return columns_ != 0 ? strip_ + i * to_stride_ : same;
  }

 private:
  // An odd number of cache lines: a block's rows lie in different sets.
  static size_t padded(size_t columns) {
    size_t lines = (columns * sizeof(T) + kCacheLine - 1) / kCacheLine;
    return (lines | 1) * kCacheLine / sizeof(T);
  }

  const T* from_;
  long stride_;
  size_t columns_;
  size_t to_stride_;
  bool askew_;
  T* strip_;
  T* next_;
  const T* source_ = nullptr;
  size_t rows_ = 0;
  size_t row_ = 0;
  size_t column_ = 0;
};

struct Tiles {
  AdaDeltaTile g, v, u;
};

// Rows and columns of one matrix. The first strip ends at row first_end.
struct Region {
  size_t row, row_end, first_end, column, column_end;
};

// A thread's own memory for its strips.
void* scratch(size_t bytes) {
  thread_local size_t size = 0;
  thread_local std::unique_ptr<std::byte[]> memory;
  if (bytes == 0) {
    return nullptr;
  }
  if (size < bytes) {
    memory.reset(new std::byte[bytes + kCacheLine]);
    size = bytes;
  }
  auto address = reinterpret_cast<uintptr_t>(memory.get());
  return memory.get() + (kCacheLine - address % kCacheLine);
}

// p: the matrix's first element, the parameter's element `first`; `columns` in
// all.
template <typename W, typename G, typename S>
ADADELTA_CLONES void update_strips(
    Pointers<W, G, S> p,
    Tiles tiles,
    Region region,
    size_t columns,
    size_t first,
    std::byte* buffer,
    Shared shared) {
  constexpr size_t strip_rows = kStripRows<G>;
  constexpr size_t step = kCacheLine / std::max(sizeof(W), sizeof(S));
  size_t column = region.column;
  size_t width = region.column_end - column;
  using TurnedG = Turned<G, strip_rows>;
  using TurnedS = Turned<S, strip_rows>;
  TurnedG g(p.g + column * tiles.g.column_stride, tiles.g, width, buffer);
  buffer += TurnedG::buffer_bytes(width);
  TurnedS v(p.v + column * tiles.v.column_stride, tiles.v, width, buffer);
  buffer += TurnedS::buffer_bytes(width);
  TurnedS u(p.u + column * tiles.u.column_stride, tiles.u, width, buffer);

  size_t begin = region.row;
  size_t end = region.first_end;
  g.advance(begin, end);
  v.advance(begin, end);
  u.advance(begin, end);
  g.turn_the_rest();
  v.turn_the_rest();
  u.turn_the_rest();
  while (begin < end) {
    size_t next_end = std::min(end + strip_rows, region.row_end);
    g.advance(end, next_end);
    v.advance(end, next_end);
    u.advance(end, next_end);
    for (size_t row = begin; row < end; ++row) {
      size_t offset = row * columns + column;
      auto line = p.at(offset);
      line.g = g.row(row - begin, line.g);
      line.v = v.row(row - begin, line.v);
      line.u = u.row(row - begin, line.u);
      size_t i = 0;
      for (; i + kPiece <= width; i += kPiece) {
        g.turn_one_block();
        v.turn_one_block();
        u.turn_one_block();
        size_t ahead = i + kAhead;
        if (ahead >= width) {
          ahead += columns - width;
        }
        for (size_t k = 0; k < kPiece; k += step) {
          prefetch(line.w + ahead + k);
          prefetch(line.v + ahead + k);
          prefetch(line.u + ahead + k);
          update(line, i + k, i + k + step, first + offset, shared);
        }
      }
      update(line, i, width, first + offset, shared);
    }
    g.turn_the_rest();
    v.turn_the_rest();
    u.turn_the_rest();
    begin = end;
    end = next_end;
  }
}

// ----------------------------------- Work -----------------------------------

// One parameter's update, cut into units that may run in any order.
struct Work {
  void (*run)(const Work&, size_t unit);
  size_t units;
  size_t elements;
  const void* w;
  const void* g;
  const void* v;
  const void* u;
  void* w_out;
  void* v_out;
  void* u_out;
  Tiles tiles;
  size_t rows; // 0: everything lies as w does
  size_t columns;
  size_t scratch_bytes; // that each thread needs
  SharedInputs shared;

  template <typename W, typename G, typename S>
  Pointers<W, G, S> pointers() const {
    return {
        static_cast<const W*>(w),
        static_cast<const G*>(g),
        static_cast<const S*>(v),
        static_cast<const S*>(u),
        static_cast<W*>(w_out),
        static_cast<S*>(v_out),
        static_cast<S*>(u_out)};
  }
};

template <typename W, typename G, typename S>
void run_linear(const Work& work, size_t unit) {
  size_t begin = unit * kUnit;
  update_linear(
      work.pointers<W, G, S>().at(begin),
      std::min(kUnit, work.elements - begin),
      begin,
      work.shared.read());
}

// How a matrix is cut into units of strips.
template <typename G>
struct StripUnits {
  static constexpr size_t strip_rows = kStripRows<G>;
  size_t width;
  size_t across;
  size_t height;
  size_t shift; // strips end where g's cache lines do, if its columns agree
  size_t down;

  explicit StripUnits(const Work& work)
      : width(std::min(work.columns, kStripColumns)),
        across((work.columns + width - 1) / width),
        height(
            std::max<size_t>(1, kStripsUnit / (width * strip_rows)) *
            strip_rows),
        shift(reinterpret_cast<uintptr_t>(work.g) % kStripBytes / sizeof(G)),
        down((work.rows + shift + height - 1) / height) {}
};

template <typename W, typename G, typename S>
void run_strips(const Work& work, size_t unit) {
  StripUnits<G> units(work);
  size_t batch = unit / (units.across * units.down);
  size_t i = unit / units.across % units.down;
  size_t j = unit % units.across;
  size_t row = i * units.height;
  Region region;
  region.row = std::max(row, units.shift) - units.shift;
  region.row_end = std::min(row + units.height - units.shift, work.rows);
  region.first_end = std::min(row + units.strip_rows - units.shift, work.rows);
  region.column = j * units.width;
  region.column_end = std::min(region.column + units.width, work.columns);
  size_t first = batch * work.rows * work.columns;
  auto p = work.pointers<W, G, S>();
  auto matrix = p.at(first);
  const auto& tiles = work.tiles;
  if (tiles.g.rows != 0) {
    matrix.g = p.g + batch * tiles.g.batch_stride;
  }
  if (tiles.v.rows != 0) {
    matrix.v = p.v + batch * tiles.v.batch_stride;
  }
  if (tiles.u.rows != 0) {
    matrix.u = p.u + batch * tiles.u.batch_stride;
  }
  auto* buffer = static_cast<std::byte*>(scratch(work.scratch_bytes));
  update_strips(
      matrix, tiles, region, work.columns, first, buffer, work.shared.read());
}

template <typename W, typename G, typename S>
void plan(Work& work) {
  if (work.rows == 0) {
    work.run = run_linear<W, G, S>;
    work.units = (work.elements + kUnit - 1) / kUnit;
  } else {
    StripUnits<G> units(work);
    work.run = run_strips<W, G, S>;
    constexpr size_t rows = kStripRows<G>;
    work.scratch_bytes = Turned<G, rows>::buffer_bytes(units.width) +
        2 * Turned<S, rows>::buffer_bytes(units.width);
    work.units =
        work.elements / (work.rows * work.columns) * units.across * units.down;
  }
}

// In the order of ADADELTA_FOR_EACH_TYPES.
#define ADADELTA_PLAN(W, G, S) plan<W##_t, G##_t, S##_t>,
constexpr decltype(&plan<float, float, float>) planners[] = {
    ADADELTA_FOR_EACH_TYPES(ADADELTA_PLAN)};
#undef ADADELTA_PLAN

Work make_work(const Operands& x, array* outputs, const SharedInputs& shared) {
  const auto& tile = x.tile();
  Work work{
      .elements = outputs[0].size(),
      .w = x.w.source.data<void>(),
      .g = x.g.source.data<void>(),
      .v = x.v.source.data<void>(),
      .u = x.u.source.data<void>(),
      .w_out = outputs[0].data<void>(),
      .v_out = outputs[1].data<void>(),
      .u_out = outputs[2].data<void>(),
      .tiles = {x.g.tile, x.v.tile, x.u.tile},
      .rows = tile.rows,
      .columns = tile.columns,
      .shared = shared};
  planners[find_types(
      x.w.source.dtype(), x.g.source.dtype(), x.v.source.dtype())](work);
  return work;
}

// How many threads there are beside the stream's own. Asked once: the answer
// comes from a file.
size_t most_helpers() {
  static const size_t cores = std::thread::hardware_concurrency();
  return std::max<size_t>(1, cores) - 1;
}

// Never joined: a stream may still run when static objects are destroyed.
ThreadPool& helpers() {
  static auto* pool = [] {
    auto some = std::make_unique<ThreadPool>(0);
    // One by one, to keep those that start. In the pool's constructor one that
    // does not would end the process.
    for (size_t i = 1; i <= most_helpers(); ++i) {
      try {
        some->resize(i);
      } catch (const std::exception&) {
        if (i == 1) {
          throw;
        }
        break; // those that there are will do
      }
    }
    return some.release();
  }();
  return *pool;
}

// A group's units, taken by whoever has time. Nobody waits for a helper that
// never came: it may be busy with another stream's group.
struct Job {
  void add(Work work) {
    elements += work.elements;
    units += work.units;
    scratch_bytes = std::max(scratch_bytes, work.scratch_bytes);
    group.push_back(std::move(work));
  }

  void take_units() {
    scratch(scratch_bytes); // which may throw: before any unit is taken
    auto work = group.begin();
    size_t first = 0; // the number of work's first unit
    for (size_t i = next++; i < units; i = next++) {
      while (i - first >= work->units) {
        first += work->units;
        ++work;
      }
      work->run(*work, i - first);
      if (++finished == units) {
        finished.notify_all();
      }
    }
  }

  void wait() {
    for (size_t i = finished; i != units; i = finished) {
      finished.wait(i);
    }
  }

  // Whether nobody had begun, and now nobody will.
  bool cancel() {
    size_t none = 0;
    if (!next.compare_exchange_strong(none, units)) {
      return false;
    }
    finished = units;
    finished.notify_all();
    return true;
  }

  std::vector<Work> group;
  size_t elements = 0;
  size_t units = 0;
  size_t scratch_bytes = 0;
  std::atomic<size_t> next{0};
  std::atomic<size_t> finished{0};
};

void run(const std::shared_ptr<Job>& job) {
  scratch(job->scratch_bytes); // or nobody begins
  size_t useful = job->elements / kParallel;
  try {
    for (size_t i = std::min(most_helpers(), useful); i > 0; --i) {
      helpers().enqueue([job] { job->take_units(); });
    }
  } catch (const std::exception&) {
    // No memory or no threads for more help: this one does what is left.
  }
  job->take_units();
  job->wait();
}

} // namespace

void AdaDeltaUpdate::eval_cpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  if (is_done(outputs)) {
    return;
  }
  Evaluation evaluation(inputs, outputs, {.transposed_state = true});
  auto& encoder = cpu::get_command_encoder(stream());
  // Shared, because MLX copies the task several times on its way.
  auto job = std::make_shared<Job>();
  job->group.reserve(params_.size());
  evaluation.make_copies(
      stream(), [&](array copy) { encoder.add_temporary(std::move(copy)); });
  evaluation.place_outputs();
  for (size_t i = 0; i < params_.size(); ++i) {
    SharedInputs shared{
        scalar(inputs, 0).data<float>(),
        scalar(inputs, 1).data<float>(),
        scalar(inputs, 2).data<bool>(),
        scalar(inputs, 3).data<uint64_t>(),
        params_[i]};
    job->add(make_work(evaluation.operands()[i], &outputs[3 * i], shared));
  }
  try {
    encoder.dispatch([job] { run(job); });
  } catch (...) {
    // The task may be queued all the same: MLX counts some tasks with a second
    // one. What has been begun gets done, while its arrays are held.
    if (!job->cancel()) {
      job->wait();
      evaluation.finish();
    }
    throw;
  }
  evaluation.finish();
}

} // namespace mlx_adadelta
