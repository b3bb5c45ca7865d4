// The global norm of gradients as an MLX operation.

#pragma once

#include <utility>
#include <vector>

#include "fallback.h"
#include "mlx/utils.h"

namespace mlx_adadelta {

/**
 * The norm of all gradients together (float32), and whether any of them holds
 * an infinity or a NaN (bool), both scalars. Reads each gradient once.
 *
 * Gradients are of any real floating point type; throws std::invalid_argument
 * otherwise. A norm too large for float32 is infinite.
 */
std::pair<mx::array, mx::array> gradient_norm(
    const std::vector<mx::array>& gradients,
    mx::StreamOrDevice s = {});

/**
 * Inputs: a group of gradients.
 * Output: their norm, and 1 if an element is not finite, otherwise 0. One
 * array, because mx.compile does not merge what a function returns: the norm
 * and the flag asked for apart are one pass.
 */
class GradientNorm : public FallbackPrimitive {
 public:
  using FallbackPrimitive::FallbackPrimitive;

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;

  const char* name() const override {
    return "GradientNorm";
  }
  bool is_equivalent(const mx::Primitive& other) const override {
    // Another copy of this library may have a class of this name: the same
    // literal means the same copy.
    return other.name() == name();
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>&) override {
    return {{2}};
  }

 private:
  std::vector<mx::array> fallback(
      const std::vector<mx::array>& inputs) override;
};

} // namespace mlx_adadelta
