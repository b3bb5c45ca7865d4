// A primitive that is also known as a graph of plain operations.

#pragma once

#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"

namespace mlx_adadelta {

namespace mx = mlx::core;

/** Its batches and derivatives are those of the plain operations. */
class FallbackPrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  std::pair<std::vector<mx::array>, std::vector<int>> vmap(
      const std::vector<mx::array>& inputs,
      const std::vector<int>& axes) override;
  std::vector<mx::array> jvp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& tangents,
      const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(
      const std::vector<mx::array>& primals,
      const std::vector<mx::array>& cotangents,
      const std::vector<int>& argnums,
      const std::vector<mx::array>& outputs) override;

 protected:
  /** The same outputs as a graph of plain MLX operations. */
  virtual std::vector<mx::array> fallback(
      const std::vector<mx::array>& inputs) = 0;
};

} // namespace mlx_adadelta
