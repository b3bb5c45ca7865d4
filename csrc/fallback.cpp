#include "fallback.h"

#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace mlx_adadelta {

using namespace mlx::core;

std::pair<std::vector<array>, std::vector<int>> FallbackPrimitive::vmap(
    const std::vector<array>& inputs,
    const std::vector<int>& axes) {
  auto function = [this](const std::vector<array>& xs) { return fallback(xs); };
  auto outputs = mlx::core::vmap(function, axes)(inputs);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

std::vector<array> FallbackPrimitive::jvp(
    const std::vector<array>& primals,
    const std::vector<array>& tangents,
    const std::vector<int>& argnums) {
  std::vector<array> all_tangents;
  for (const auto& primal : primals) {
    all_tangents.push_back(zeros_like(primal, stream()));
  }
  for (size_t i = 0; i < argnums.size(); ++i) {
    all_tangents[argnums[i]] = tangents[i];
  }
  auto function = [this](const std::vector<array>& xs) { return fallback(xs); };
  return mlx::core::jvp(function, primals, all_tangents).second;
}

std::vector<array> FallbackPrimitive::vjp(
    const std::vector<array>& primals,
    const std::vector<array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<array>&) {
  auto function = [this](const std::vector<array>& xs) { return fallback(xs); };
  auto all = mlx::core::vjp(function, primals, cotangents).second;
  std::vector<array> wanted;
  for (int i : argnums) {
    wanted.push_back(all[i]);
  }
  return wanted;
}

} // namespace mlx_adadelta
