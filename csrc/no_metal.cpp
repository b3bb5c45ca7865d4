// Stands in for eval_metal.cpp where MLX was built without Metal.

#include <stdexcept>

#include "adadelta.h"
#include "norm.h"

namespace mlx_adadelta {

namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "[eval_gpu] This build of mlx-adadelta has no Metal kernels; use a CPU "
      "stream or the \"mlx\" backend.");
}

} // namespace

void AdaDeltaUpdate::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  refuse();
}

void GradientNorm::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  refuse();
}

} // namespace mlx_adadelta
