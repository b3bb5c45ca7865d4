// How a parameter's four arrays lie in memory, and which memory may be reused.

#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "adadelta_step.h"
#include "mlx/array.h"
#include "mlx/stream.h"
#include "mlx_compat.h"

namespace mlx_adadelta {

namespace mx = mlx::core;

/** Some axes of an array, as one. */
struct Axis {
  int64_t length;
  int64_t stride;
};

/** Adds an axis within the others; merges it where one stride serves both. */
void add_axis(std::vector<Axis>& axes, Axis next);

/** An input as the kernels read it. */
struct Operand {
  mx::array source;
  bool odd; // neither lies as w does nor is transposed: is copied first
  std::optional<Memory> fresh{}; // of the output, if it cannot be the source's
};

/**
 * One parameter's inputs, and how its outputs lie. A group of them stays below
 * the 1 kB up to which malloc is quick.
 */
struct Operands {
  Operand w, g, v, u;
  AdaDeltaTile tile; // of a transposed g; no rows: g lies as w does
  std::vector<int> order; // w's axes, outermost in memory first
  mx::Strides strides;
  mx::array::Flags flags;

  bool transposed() const {
    return tile.rows != 0;
  }
};

/**
 * The array itself if its elements lie side by side, in whatever order of its
 * axes; otherwise a copy of it, made on the stream and given to `keep`, which
 * must keep it alive until the stream is done with it.
 */
mx::array make_dense(
    const mx::array& x,
    mx::Stream stream,
    const std::function<void(mx::array)>& keep);

/**
 * Whether these outputs have been evaluated: a finished Evaluation has cleared
 * inputs of outputs. MLX evaluates outputs a second time if it ran out of
 * memory or reported another task's error before it marked them as evaluated.
 */
bool is_done(const std::vector<mx::array>& outputs);

/**
 * The steps that eval_cpu and eval_gpu share. Only this order survives a throw:
 * construct (looks at the layouts and allocates each output that cannot have
 * its input's memory), look up kernels, prepare(), dispatch, finish().
 *
 * MLX keeps a copy of a primitive's inputs in every output, so that no input
 * looks reusable. The constructor clears these copies; the destructor puts them
 * back unless finish() was called.
 */
class Evaluation {
 public:
  Evaluation(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs);

  /**
   * Replaces inputs by dense copies, made on the stream, where their layout
   * needs it. `keep` must hold each copy until the stream is done with it.
   * Then gives the outputs their memory.
   */
  void prepare(mx::Stream stream, const std::function<void(mx::array)>& keep);

  void finish() {
    guard_.cleared.clear();
  }

  const std::vector<Operands>& operands() const {
    return operands_;
  }

 private:
  // Gives the cleared outputs their inputs back.
  struct Guard {
    explicit Guard(const std::vector<mx::array>& inputs) : inputs(inputs) {}
    Guard(const Guard&) = delete;
    ~Guard();
    const std::vector<mx::array>& inputs;
    std::vector<mx::array*> cleared;
  };

  Guard guard_;
  std::vector<mx::array>& outputs_;
  std::vector<Operands> operands_;
};

} // namespace mlx_adadelta
