// Stands in for csrc/eval_cpu.cpp: a CPU stream runs the Metal path.

#include "adadelta.h"
#include "norm.h"

namespace mlx_adadelta {

void AdaDeltaUpdate::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  eval_gpu(inputs, outputs);
}

void GradientNorm::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  eval_gpu(inputs, outputs);
}

} // namespace mlx_adadelta
