// The tiled update: of a matrix whose gradient is transposed.
//
// The gradient of a strip of rows is turned into a buffer block by block, each
// between two pieces of the strip before, which hides a part of the waiting for
// memory: up to a tenth of the update.

#pragma once

#include <utility>

#include "job.h"
#include "linear.h"

namespace mlx_adadelta {

namespace {

// A strip's part of a column is two cache lines. One wastes half of what the
// hardware fetches, four do not pay for the larger buffer.
constexpr size_t kStripBytes = 2 * kCacheLine;
// Rows are cut only beyond this, where two strips outgrow the L2 cache: the
// hardware prefetches far across each cut.
constexpr size_t kStripColumns = 4096;
// A thread takes about this many elements of strips at a time: the first strip
// is turned with nothing to hide behind.
constexpr size_t kStripsUnit = 1 << 17;
constexpr size_t kSide = 8; // of a block, which is turned in registers
constexpr size_t kPiece = 256; // elements updated at a time
// How far ahead to ask for memory: the interleaved accesses confuse the
// hardware's own prefetching.
constexpr size_t kAheadColumns = 32;

// How a parameter's matrices are cut into units of strips.
struct TiledUnits {
  size_t strip_rows;
  size_t width; // columns
  size_t across;
  size_t height; // rows
  size_t shift; // strips end where g's cache lines do, if its columns agree
  size_t down;
  size_t turned_stride; // of a row in the buffer

  TiledUnits(const Elements& x, const AdaDeltaTile& tile) {
    size_t size = x.g_type.size();
    strip_rows = kStripBytes / size;
    width = std::min<size_t>(tile.columns, kStripColumns);
    across = (tile.columns + width - 1) / width;
    height = std::max<size_t>(1, kStripsUnit / (width * strip_rows));
    height *= strip_rows;
    shift = reinterpret_cast<uintptr_t>(x.g) % kStripBytes / size;
    down = (tile.rows + shift + height - 1) / height;
    // An odd number of cache lines: a block's rows lie in different sets.
    size_t lines = (width * size + kCacheLine - 1) / kCacheLine | 1;
    turned_stride = lines * kCacheLine / size;
  }
};

// Two turned strips, whichever the gradient's type.
static_assert(2 * kStripBytes * (kStripColumns + kCacheLine) <= kScratch);

// to[r * to_stride + c] = from[c * from_stride + r], r below rows, c below
// columns, both below kSide. T is an unsigned integer of the elements' size.
template <typename T>
ADADELTA_INLINE void turn_block(
    const T* from,
    int64_t from_stride,
    T* to,
    size_t to_stride,
    size_t rows,
    size_t columns) {
#if __has_builtin(__builtin_shufflevector)
  if (rows >= kSide && columns >= kSide) {
    typedef T Vector __attribute__((vector_size(kSide * sizeof(T))));
    Vector a[kSide];
    Vector b[kSide];
    for (size_t i = 0; i < kSide; ++i) {
      std::memcpy(&a[i], from + i * from_stride, sizeof(Vector));
    }
    // Each round interleaves the first half with the second.
    for (int round = 0; round < 3; ++round) {
      for (size_t i = 0; i < kSide; i += 2) {
        auto x = a[i / 2];
        auto y = a[(i + kSide) / 2];
        b[i] = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
        b[i + 1] = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
      }
      std::memcpy(a, b, sizeof(a));
    }
    for (size_t i = 0; i < kSide; ++i) {
      std::memcpy(to + i * to_stride, &a[i], sizeof(Vector));
    }
    return;
  }
#endif
  for (size_t c = 0; c < std::min(kSide, columns); ++c) {
    for (size_t r = 0; r < std::min(kSide, rows); ++r) {
      to[r * to_stride + c] = from[c * from_stride + r];
    }
  }
}

// A strip of the gradient, and how far it has been turned.
template <typename T>
struct Strip {
  const T* from;
  int64_t from_stride;
  T* to;
  size_t to_stride;
  size_t rows;
  size_t columns;
  size_t row = 0;
  size_t column = 0;

  // Whether there was one.
  ADADELTA_INLINE bool turn_one_block() {
    if (rows == 0 || column >= columns) {
      return false;
    }
    const T* x = from + column * from_stride + row;
    T* y = to + row * to_stride + column;
    size_t ahead = column + kAheadColumns;
    for (size_t c = 0; c < kSide && ahead + c < columns; ++c) {
      // To L2: columns a power of two apart evict one another from L1.
      __builtin_prefetch(x + (kAheadColumns + c) * from_stride, 0, 2);
    }
    turn_block(x, from_stride, y, to_stride, rows - row, columns - column);
    row += kSide;
    if (row >= rows) {
      row = 0;
      column += kSide;
    }
    return true;
  }
};

// x: the parameter's first element. T: an unsigned integer of the gradient's
// size. Of the two strips in the buffer one is read, the next one is turned.
template <typename T>
ADADELTA_CLONES void update_tiled(
    const Elements& x,
    const AdaDeltaTile& tile,
    size_t unit,
    const Scalars& scalars) {
  const TiledUnits units(x, tile);
  size_t column = unit % units.across * units.width;
  size_t width = std::min(units.width, tile.columns - column);
  size_t begin = unit / units.across % units.down * units.height;
  size_t end = std::min(begin + units.height - units.shift, size_t{tile.rows});
  size_t matrix = unit / (units.across * units.down);
  const T* g = reinterpret_cast<const T*>(x.g) + matrix * tile.batch_stride +
      column * tile.column_stride;
  T* to = reinterpret_cast<T*>(scratch());
  T* next_to = to + units.strip_rows * units.turned_stride;
  // The strip that begins at this row of the matrix, not turned yet.
  auto strip_at = [&](size_t row) {
    size_t rows = units.strip_rows - (row + units.shift) % units.strip_rows;
    rows = std::min(rows, end - row);
    std::swap(to, next_to);
    return Strip<T>{
        g + row, tile.column_stride, to, units.turned_stride, rows, width};
  };
  size_t row = std::max(begin, units.shift) - units.shift;
  auto strip = strip_at(row);
  while (strip.turn_one_block()) {
  }
  while (strip.rows != 0) {
    auto next = strip_at(row + strip.rows);
    for (size_t r = 0; r < strip.rows; ++r, ++row) {
      size_t place = (matrix * tile.rows + row) * tile.columns + column;
      auto elements = x.at(place);
      elements.g = reinterpret_cast<const std::byte*>(
          strip.to + r * units.turned_stride);
      for (size_t i = 0; i < width; i += kPiece) {
        size_t n = std::min(kPiece, width - i);
        for (size_t k = 0; k < n; k += kSide * kSide) {
          next.turn_one_block();
        }
        update(elements.at(i), n, place + i, scalars);
      }
    }
    while (next.turn_one_block()) {
    }
    strip = next;
  }
}

} // namespace

} // namespace mlx_adadelta
