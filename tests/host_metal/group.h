// What faults.cpp and threads.cpp share: an update that they evaluate as MLX
// does, and memory that fails where they say so.

#pragma once

#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "adadelta.h"
#include "mlx/mlx.h"
#include "require.h"

namespace {

bool fails(size_t size); // whether this allocation does

} // namespace

void* operator new(size_t size) {
  void* memory = fails(size) ? nullptr : std::malloc(size);
  if (!memory) {
    throw std::bad_alloc();
  }
  return memory;
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}

namespace {

using namespace mlx::core;

enum Layout { kSame, kTransposed, kSliced };

array lay(const array& x, Layout layout) {
  auto y = layout == kTransposed ? transpose(contiguous(transpose(x)))
      : layout == kSliced
      ? slice(pad(x, 1), {1, 1}, {x.shape(0) + 1, x.shape(1) + 1})
      : x;
  eval(y);
  return y;
}

struct Case {
  const char* name;
  Shape shape;
  Layout w, g, v;
  bool held = false; // somebody else holds w: it may not be reused
  mlx_adadelta::AdaDeltaOptions options{};
};

std::string bytes(const std::vector<array>& arrays) {
  std::string all;
  for (const auto& x : arrays) {
    all.append(x.data<char>(), x.data_size() * x.itemsize());
  }
  return all;
}

// An update of two parameters, which only the graph holds.
struct Group {
  std::vector<array> held;
  std::vector<array> outputs;

  explicit Group(const Case& c) {
    std::vector<array> w, g, v, u;
    for (int i = 0; i < 2; ++i) {
      auto make = [&](int j, Layout layout) {
        auto key = random::key(4 * i + j);
        return lay(random::uniform(c.shape, float32, key), layout);
      };
      w.push_back(make(0, c.w));
      g.push_back(make(1, c.g));
      v.push_back(make(2, c.v));
      u.push_back(make(3, kSame));
    }
    if (c.held) {
      held.insert(held.end(), w.begin(), w.end());
    }
    auto updates =
        mlx_adadelta::adadelta_update(w, g, v, u, array(0.5f), c.options);
    outputs = updates.parameters[0].outputs();
    require(outputs.size() == 6, "a group is not of two parameters");
  }

  // Evaluates as MLX does.
  void evaluate(bool metal, size_t asked_for = 0) {
    auto& arr = outputs[asked_for];
    auto all = arr.outputs();
    if (metal) {
      arr.primitive().eval_gpu(arr.inputs(), all);
    } else {
      arr.primitive().eval_cpu(arr.inputs(), all);
    }
  }

  std::string inputs() const {
    return bytes(outputs[0].inputs());
  }
};

} // namespace
