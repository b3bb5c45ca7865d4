// Stands in for eval_metal.cpp where MLX was built without Metal.

#include <stdexcept>

#include "adadelta.h"

namespace mlx_adadelta {

void AdaDeltaUpdate::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  throw std::runtime_error(
      "[AdaDeltaUpdate::eval_gpu] This build of mlx-adadelta has no Metal "
      "kernels; use a CPU stream or the \"mlx\" backend.");
}

} // namespace mlx_adadelta
