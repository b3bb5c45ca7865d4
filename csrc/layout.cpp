#include "layout.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

// MLX gives no buffer to an output that is smaller by more bytes than this.
constexpr size_t kDonationSlack = 16384;

// The axes longer than one, outermost in memory first.
std::vector<int> memory_order(const array& x) {
  std::vector<int> axes;
  for (int i = 0; i < static_cast<int>(x.ndim()); ++i) {
    if (x.shape(i) > 1) {
      axes.push_back(i);
    }
  }
  std::stable_sort(axes.begin(), axes.end(), [&x](int a, int b) {
    return x.strides(a) > x.strides(b);
  });
  return axes;
}

// The axes of x in the given order. Neighbours are merged if one stride walks
// both.
std::vector<Axis> collapse(const array& x, const std::vector<int>& order) {
  std::vector<Axis> axes;
  for (int i : order) {
    add_axis(axes, {x.shape(i), x.strides(i)});
  }
  return axes;
}

bool is_linear(const std::vector<Axis>& axes) {
  return axes.empty() || (axes.size() == 1 && axes[0].stride == 1);
}

// The tile of axes (rows, columns) or (batch, rows, columns) if the rows are
// adjacent in memory; otherwise a tile without rows.
AdaDeltaTile find_tile(const std::vector<Axis>& axes) {
  if (axes.size() != 2 && axes.size() != 3) {
    return {};
  }
  const auto& rows = axes[axes.size() - 2];
  const auto& columns = axes[axes.size() - 1];
  constexpr int64_t limit = std::numeric_limits<uint32_t>::max();
  if (rows.stride != 1 || columns.stride < rows.length || axes[0].stride <= 0 ||
      rows.length > limit || columns.length > limit) {
    return {};
  }
  return {
      axes.size() == 3 ? axes[0].stride : 0,
      columns.stride,
      static_cast<uint32_t>(rows.length),
      static_cast<uint32_t>(columns.length)};
}

// An evaluated copy of x, row-contiguous over the axes in the given order.
// `keep` holds it until the stream has read it.
array dense_copy(
    const array& x,
    const std::vector<int>& order,
    Stream stream,
    const std::function<void(array)>& keep) {
  Shape shape;
  Strides strides;
  for (int i : order) {
    shape.push_back(x.shape(i));
    strides.push_back(x.strides(i));
  }
  array view(shape, x.dtype(), nullptr, {});
  view.copy_shared_buffer(x, strides, {false, false, false}, x.data_size());

  // MLX exports no copy function for use inside eval, but the primitive of
  // contiguous() can be run here.
  auto copy = contiguous(view, false, stream);
  std::vector<array> outputs{copy};
  try {
    if (stream.device == Device::gpu) {
      copy.primitive().eval_gpu({view}, outputs);
    } else {
      copy.primitive().eval_cpu({view}, outputs);
    }
    keep(copy);
  } catch (...) {
    synchronize(stream); // it may still write the copy
    throw;
  }
  return copy;
}

// Looks at how one parameter's w, g, v and u (all evaluated) lie, and allocates
// what its outputs need. The kernels read g where it lies as w does or
// transposed. Everything else is copied to lie as w does; an odd w (sliced,
// broadcast, reversed) is made row-contiguous.
Operands look_at_layout(const array* wgvu) {
  const auto& w = wgvu[0];
  // Most tensors are row-contiguous: skip the look at their axes.
  bool plain = w.size() == 0 || std::all_of(wgvu, wgvu + 4, [](const array& x) {
                 return x.flags().row_contiguous;
               });
  auto order = plain ? std::vector<int>{} : memory_order(w);
  auto strides = w.strides();
  auto flags = w.flags();
  if (!is_linear(collapse(w, order))) {
    std::sort(order.begin(), order.end());
    array row_contiguous(w.shape(), w.dtype(), nullptr, {});
    strides = row_contiguous.strides();
    flags = row_contiguous.flags();
    flags.col_contiguous = order.size() <= 1;
  }

  auto look = [&order](const array& x) {
    bool linear = is_linear(collapse(x, order));
    // Ask before x is copied into the operand: the copy is one more owner.
    bool reusable = linear && x.is_donatable() &&
        x.buffer_size() <= x.nbytes() + kDonationSlack;
    Operand operand{x, !linear};
    if (!reusable) {
      operand.fresh.emplace(allocator::malloc(x.nbytes()));
    }
    return operand;
  };
  auto g_axes = collapse(wgvu[1], order);
  auto tile = find_tile(g_axes);
  return {
      look(w),
      {wgvu[1], tile.rows == 0 && !is_linear(g_axes)},
      look(wgvu[2]),
      look(wgvu[3]),
      tile,
      std::move(order),
      std::move(strides),
      flags};
}

} // namespace

void add_axis(std::vector<Axis>& axes, Axis next) {
  if (!axes.empty() && axes.back().stride == next.length * next.stride) {
    axes.back() = {axes.back().length * next.length, next.stride};
  } else {
    axes.push_back(next);
  }
}

array make_dense(
    const array& x,
    Stream stream,
    const std::function<void(array)>& keep) {
  auto order = memory_order(x);
  bool dense = x.size() == 0 || is_linear(collapse(x, order));
  return dense ? x : dense_copy(x, order, stream, keep);
}

bool is_done(const std::vector<array>& outputs) {
  return std::any_of(outputs.begin(), outputs.end(), [](const array& out) {
    return out.inputs().empty();
  });
}

Evaluation::Guard::~Guard() {
  for (auto* out : cleared) {
    out->inputs() = inputs;
  }
}

Evaluation::Evaluation(
    const std::vector<array>& inputs,
    std::vector<array>& outputs)
    : guard_(inputs), outputs_(outputs) {
  size_t tensors = outputs.size() / 3;
  size_t scalars = inputs.size() - 4 * tensors;
  guard_.cleared.reserve(outputs.size());
  operands_.reserve(tensors);
  for (auto& out : outputs) {
    if (&out.inputs() != &inputs && !out.is_tracer()) {
      out.inputs().clear();
      guard_.cleared.push_back(&out);
    }
  }
  for (size_t i = 0; i < tensors; ++i) {
    operands_.push_back(look_at_layout(&inputs[scalars + 4 * i]));
  }
}

void Evaluation::prepare(
    Stream stream,
    const std::function<void(array)>& keep) {
  for (auto& operands : operands_) {
    for (auto* x : {&operands.w, &operands.g, &operands.v, &operands.u}) {
      if (x->odd) {
        x->source = dense_copy(x->source, operands.order, stream, keep);
      }
    }
  }
  // No output is touched before all copies are made.
  auto out = outputs_.begin();
  for (auto& operands : operands_) {
    const auto& strides = operands.strides;
    for (auto* x : {&operands.w, &operands.v, &operands.u}) {
      if (x->fresh) {
        out->set_data(
            std::move(*x->fresh), out->size(), strides, operands.flags);
      } else {
        out->copy_shared_buffer(
            x->source, strides, operands.flags, out->size());
      }
      ++out;
    }
  }
}

} // namespace mlx_adadelta
