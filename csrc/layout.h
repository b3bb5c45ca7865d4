// How the four arrays of a parameter lie in memory, and what may be reused.

#pragma once

#include <optional>
#include <vector>

#include "adadelta_step.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace mlx_adadelta {

namespace mx = mlx::core;

/** An input as the kernels read it. */
struct Operand {
  mx::array source;
  bool reusable; // nobody else can see the memory, and it lies as w does
  AdaDeltaTile tile{}; // no rows: lies as w does

  bool transposed() const {
    return tile.rows != 0;
  }
};

/**
 * One parameter's inputs, and how its outputs are to lie. Transposed operands
 * agree on rows and columns.
 */
struct Operands {
  Operand w, g, v, u;
  mx::Strides strides;
  mx::array::Flags flags;

  /** The first transposed operand's tile; no rows where all lie alike. */
  const AdaDeltaTile& tile() const;
};

/**
 * Looks at how one parameter's w, g, v and u (all evaluated) lie. What is
 * neither as w nor transposed against it is copied to lie as w does; an odd w
 * (sliced, broadcast, reversed) is copied to be row-contiguous. Copies are
 * appended to `temporaries`. Without `transposed_state` v and u are copied
 * where they are transposed.
 */
Operands look_at_layout(
    const mx::array* wgvu,
    bool transposed_state,
    mx::Stream stream,
    std::vector<mx::array>& temporaries);

/**
 * What eval_cpu and eval_gpu have in common, in the one order that survives a
 * throw: construct (looks at the layouts, allocates each output that cannot
 * have its input's memory), look up kernels, place_outputs(), dispatch,
 * finish().
 *
 * MLX keeps a copy of a primitive's inputs in every output, which hides that
 * an input could be reused. The copies are taken away first and put back if
 * finish() is never reached.
 */
class Evaluation {
 public:
  Evaluation(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs,
      bool transposed_state,
      mx::Stream stream);
  ~Evaluation();
  Evaluation(const Evaluation&) = delete;
  Evaluation& operator=(const Evaluation&) = delete;

  void place_outputs();

  void finish() {
    cleared_.clear();
  }

  const std::vector<Operands>& operands() const {
    return operands_;
  }
  /** Copies that must live until the kernels have run. */
  const std::vector<mx::array>& temporaries() const {
    return temporaries_;
  }

 private:
  void restore();

  const std::vector<mx::array>& inputs_;
  std::vector<mx::array>& outputs_;
  std::vector<mx::array*> cleared_;
  std::vector<Operands> operands_;
  std::vector<mx::array> temporaries_;
  // For each output; none where the input's memory serves.
  std::vector<std::optional<mx::allocator::Data>> fresh_;
};

} // namespace mlx_adadelta
