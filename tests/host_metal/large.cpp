// Updates arrays of more than 2^32 elements:
//   large cpu|metal [G]   on the mock of Metal only G threadgroups at either
//   end
//
// A failed check ends the program.

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstdlib>
#include <string_view>

#include "adadelta.h"
#include "mlx/allocator.h"
#include "mlx/memory.h"
#include "mlx/mlx.h"
#include "require.h"

using namespace mlx::core;

extern "C" size_t host_metal_most_groups; // of the mock

namespace {

constexpr int kRows = 65537;
constexpr int kColumns = 65539;
constexpr size_t kSize = size_t{kRows} * kColumns;
static_assert(kSize > size_t{1} << 32);
constexpr size_t kCorner = 4; // rows and columns of each corner
constexpr size_t kEnd = 1 << 20; // bytes at either end with memory of their own
// Bytes of memory that stand for all the rest.
constexpr size_t kChunk = 1 << 24;

static_assert(kEnd > (kCorner + 1) * kColumns * sizeof(bfloat16_t));

// An array of more than 2^32 elements in a few megabytes: all but its ends is
// the same chunk of memory, again and again.
array make_large(float value) {
  size_t size = kSize * sizeof(bfloat16_t);
  array x(allocator::malloc(size), {kRows, kColumns}, bfloat16);
  auto address = reinterpret_cast<uintptr_t>(x.data<char>());
  auto begin = (address + kEnd + kChunk - 1) / kChunk * kChunk;
  auto end = (address + size - kEnd) / kChunk * kChunk;
  int file = memfd_create("chunk", 0);
  require(file >= 0 && ftruncate(file, kChunk) == 0, "no memory file");
  for (auto at = begin; at < end; at += kChunk) {
    auto* chunk = mmap(
        reinterpret_cast<void*>(at),
        kChunk,
        PROT_READ | PROT_WRITE,
        MAP_SHARED | MAP_FIXED,
        file,
        0);
    require(chunk != MAP_FAILED, "cannot map a chunk");
  }
  close(file);
  auto* elements = x.data<bfloat16_t>();
  auto* chunk = reinterpret_cast<bfloat16_t*>(begin);
  std::fill(elements, chunk + kChunk / sizeof(bfloat16_t), bfloat16_t(value));
  std::fill(
      reinterpret_cast<bfloat16_t*>(end), elements + kSize, bfloat16_t(value));
  return x;
}

// Calls f(index, row, column) of the corners.
template <typename F>
void for_each_corner_element(F f) {
  auto index = [](size_t i, size_t n) {
    return i < kCorner ? i : n - 2 * kCorner + i;
  };
  for (size_t i = 0; i < 2 * kCorner; ++i) {
    for (size_t j = 0; j < 2 * kCorner; ++j) {
      f(2 * kCorner * i + j, index(i, kRows), index(j, kColumns));
    }
  }
}

// A step changes the corners only: elsewhere v, u and g are 0. So a misplaced
// element shows.
void check_large(bool metal, bool transposed) {
  constexpr int corner = 2 * kCorner;
  array small[] = {
      random::normal({corner, corner}, bfloat16, random::key(0)),
      random::normal({corner, corner}, bfloat16, random::key(1)),
      random::uniform({corner, corner}, bfloat16, random::key(2)),
      random::uniform({corner, corner}, bfloat16, random::key(3)),
  };
  constexpr float rest[] = {1, 0, 0, 0};
  auto update = [](const array& w, array g, array v, array u) {
    auto updates =
        mlx_adadelta::adadelta_update({w}, {g}, {v}, {u}, array(0.5f));
    return updates.parameters[0].outputs();
  };
  std::vector<array> outputs;
  std::vector<char*> places;
  {
    std::vector<array> large;
    for (int i = 0; i < 4; ++i) {
      eval(small[i]);
      large.push_back(make_large(rest[i]));
      auto* values = small[i].data<bfloat16_t>();
      auto* elements = large[i].data<bfloat16_t>();
      for_each_corner_element([&](size_t k, size_t row, size_t column) {
        bool turned = transposed && i == 1;
        elements[turned ? row + column * kRows : row * kColumns + column] =
            values[k];
      });
      places.push_back(large[i].data<char>());
    }
    if (transposed) {
      auto turned = reshape(large[1], {kColumns, kRows});
      large[1] = transpose(turned);
      eval(large[1]);
    }
    outputs = update(large[0], large[1], large[2], large[3]);
  }
  auto all = outputs[0].outputs();
  auto& primitive = outputs[0].primitive();
  if (metal) {
    primitive.eval_gpu(outputs[0].inputs(), all);
  } else {
    primitive.eval_cpu(outputs[0].inputs(), all);
  }
  synchronize(default_stream(Device::cpu));
  // A small matrix of the same values gives the expected ones.
  auto expected = update(small[0], small[1], small[2], small[3]);
  host_metal_most_groups = -1;
  eval(expected);
  const size_t sources[] = {0, 2, 3};
  for (size_t i = 0; i < 3; ++i) {
    auto* elements = outputs[i].data<bfloat16_t>();
    require(
        outputs[i].data<char>() == places[sources[i]], "not updated in place");
    const auto* right = expected[i].data<uint16_t>();
    auto bits = [](bfloat16_t x) { return std::bit_cast<uint16_t>(x); };
    const auto usual = bits(bfloat16_t(rest[sources[i]]));
    for_each_corner_element([&](size_t k, size_t row, size_t column) {
      auto& x = elements[row * kColumns + column];
      require(
          bits(x) == right[k],
          "wrong at row ",
          row,
          ", column ",
          column,
          " of output ",
          i);
      require(bits(x) != usual, "a corner that shows nothing");
      x = std::bit_cast<bfloat16_t>(usual);
    });
    // The ends, and each address of the chunk once.
    size_t end = (kEnd + 2 * kChunk) / sizeof(bfloat16_t);
    for (size_t k = 0; k < end; ++k) {
      require(bits(elements[k]) == usual, "changed at ", k);
      require(bits(elements[kSize - 1 - k]) == usual, "changed at -", k);
    }
  }
}

} // namespace

int main(int argc, char** argv) {
  set_default_device(Device::cpu);
  set_cache_limit(0);
  for (bool transposed : {false, true}) {
    host_metal_most_groups = argc > 2 ? std::atoll(argv[2]) : -1;
    check_large(argv[1] == std::string_view("metal"), transposed);
  }
}
