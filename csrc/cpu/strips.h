// The update of a matrix whose gradient is transposed.
//
// The gradient of a strip of rows is turned into a buffer block by block, each
// between two pieces of the strip before: a core waits for memory longer than
// it computes, so that the turning is nearly free.

#pragma once

#include <type_traits>
#include <utility>

#include "linear.h"

namespace mlx_adadelta {

namespace {

constexpr size_t kCacheLine = 64;
// A strip's part of a column is two cache lines. One wastes half of what the
// hardware fetches, four do not pay for the larger buffer.
constexpr size_t kStripBytes = 2 * kCacheLine;
// Rows are cut only beyond this, where two strips outgrow the L2 cache: the
// hardware prefetches far across each cut.
constexpr size_t kStripColumns = 4096;
constexpr size_t kSide = 8; // of a block, which is turned in registers
// Elements updated at a time, and how many of them for each block.
constexpr size_t kPiece = 256;
constexpr size_t kPerBlock = 64;
// How far ahead to ask for memory: the interleaved accesses confuse the
// hardware's own prefetching.
constexpr size_t kAheadColumns = 32;
constexpr size_t kAhead = 512;
// A thread takes about this many elements of strips at a time: the first strip
// is turned with nothing to hide behind.
constexpr size_t kStripsUnit = 1 << 17;

// To L2: columns a power of two apart evict one another from L1.
inline void prefetch([[maybe_unused]] const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#endif
}

// to[r * to_stride + c] = from[c * from_stride + r], r and c below kSide. T is
// an unsigned integer of the elements' size.
template <typename T>
ADADELTA_INLINE void
turn_block(const T* from, int64_t from_stride, T* to, size_t to_stride) {
#if __has_builtin(__builtin_shufflevector)
  typedef T Vector __attribute__((vector_size(kSide * sizeof(T))));
  Vector a[kSide];
  Vector b[kSide];
  for (size_t i = 0; i < kSide; ++i) {
    std::memcpy(&a[i], from + i * from_stride, sizeof(Vector));
  }
  // Pairs, then quadruples, within 128 bits; then halves.
  for (size_t i = 0; i < kSide; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] =
        __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (size_t i = 0; i < kSide; i += 4) {
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
  for (size_t i = 0; i < kSide; ++i) {
    std::memcpy(to + i * to_stride, &b[i], sizeof(Vector));
  }
#else
  for (size_t c = 0; c < kSide; ++c) {
    for (size_t r = 0; r < kSide; ++r) {
      to[r * to_stride + c] = from[c * from_stride + r];
    }
  }
#endif
}

// The transposed gradient in strips of rows: one strip turned, to be read, and
// the next one being turned.
template <typename T>
class Turned {
 public:
  // from: the gradient of element (0, 0) of the columns in question.
  Turned(const T* from, int64_t stride, size_t columns, std::byte* buffer)
      : from_(from),
        stride_(stride),
        columns_(columns),
        to_stride_(padded(columns)),
        askew_(stride_ * sizeof(T) % kCacheLine != 0),
        strip_(reinterpret_cast<T*>(buffer)),
        next_(strip_ + kStripBytes / sizeof(T) * to_stride_) {}

  static size_t buffer_bytes(size_t columns) {
    return 2 * kStripBytes * padded(columns);
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
    if (row_ + kSide <= rows_ && column_ + kSide <= columns_) {
      if (column_ + kAheadColumns + kSide <= columns_) {
        prefetch_ahead(from);
      }
      turn_block(from, stride_, to, to_stride_);
    } else {
      for (size_t c = 0; c < std::min(kSide, columns_ - column_); ++c) {
        for (size_t r = 0; r < std::min(kSide, rows_ - row_); ++r) {
          to[r * to_stride_ + c] = from[c * stride_ + r];
        }
      }
    }
    row_ += kSide;
    if (row_ >= rows_) {
      row_ = 0;
      column_ += kSide;
    }
  }

  ADADELTA_INLINE void turn_the_rest() {
    while (column_ < columns_) {
      turn_one_block();
    }
  }

  ADADELTA_INLINE const std::byte* row(size_t i) const {
    return reinterpret_cast<const std::byte*>(strip_ + i * to_stride_);
  }

 private:
  // An odd number of cache lines: a block's rows lie in different sets.
  static size_t padded(size_t columns) {
    size_t lines = (columns * sizeof(T) + kCacheLine - 1) / kCacheLine;
    return (lines | 1) * kCacheLine / sizeof(T);
  }

  // A block's share of the cache lines that its row of blocks lies in.
  ADADELTA_INLINE void prefetch_ahead(const T* from) {
    constexpr size_t share = kSide * kSide * sizeof(T) / kCacheLine;
    size_t row = row_ % (kCacheLine / sizeof(T));
    const T* ahead =
        from - row + (kAheadColumns + row / kSide * share) * stride_;
    for (size_t c = 0; c < share; ++c) {
      prefetch(ahead + c * stride_);
    }
    if (askew_ && row_ + 2 * kSide > rows_) {
      for (size_t c = 0; c < kSide; ++c) {
        prefetch(from + (c + kAheadColumns) * stride_ + kSide - 1);
      }
    }
  }

  const T* from_;
  int64_t stride_;
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

// Rows and columns of one matrix. The first strip ends at row first_end.
struct Region {
  size_t row, row_end, first_end, column, column_end;
};

// Asks for the memory that is updated after these elements: kPerBlock of them,
// `ahead` elements further on.
inline void prefetch_elements(const Elements& x, size_t ahead) {
  size_t w = size_of(x.w_type);
  size_t state = size_of(x.state_type);
  for (size_t i = 0; i < kPerBlock * w; i += kCacheLine) {
    prefetch(x.w + ahead * w + i);
  }
  for (size_t i = 0; i < kPerBlock * state; i += kCacheLine) {
    prefetch(x.v + ahead * state + i);
    prefetch(x.u + ahead * state + i);
  }
}

// x: the matrix's first element, whose place in memory is `place`. T: an
// unsigned integer of the gradient's size.
template <typename T>
ADADELTA_CLONES void update_strips(
    const Elements& x,
    const AdaDeltaTile& tile,
    const Region& region,
    uint64_t place,
    std::byte* buffer,
    const Scalars& scalars) {
  constexpr size_t strip_rows = kStripBytes / sizeof(T);
  size_t columns = tile.columns;
  size_t width = region.column_end - region.column;
  Turned<T> g(
      reinterpret_cast<const T*>(x.g) + region.column * tile.column_stride,
      tile.column_stride,
      width,
      buffer);
  size_t begin = region.row;
  size_t end = region.first_end;
  g.advance(begin, end);
  g.turn_the_rest();
  while (begin < end) {
    size_t next_end = std::min(end + strip_rows, region.row_end);
    g.advance(end, next_end);
    for (size_t row = begin; row < end; ++row) {
      size_t offset = row * columns + region.column;
      auto line = x.at(offset);
      line.g = g.row(row - begin);
      for (size_t i = 0; i < width; i += kPiece) {
        size_t piece = std::min(kPiece, width - i);
        auto elements = line.at(i);
        for (size_t k = 0; k + kPerBlock <= piece; k += kPerBlock) {
          g.turn_one_block();
          // In the next row where this one ends.
          bool inside = i + k + kAhead < width;
          prefetch_elements(
              elements, k + kAhead + (inside ? 0 : columns - width));
        }
        update(elements, piece, place + offset + i, scalars);
      }
    }
    g.turn_the_rest();
    begin = end;
    end = next_end;
  }
}

} // namespace

} // namespace mlx_adadelta
