#include "norm.h"

#include <sstream>
#include <stdexcept>

#include "mlx/ops.h"

namespace mlx_adadelta {

using namespace mlx::core;

std::pair<array, array> gradient_norm(
    const std::vector<array>& gradients,
    StreamOrDevice s /* = {} */) {
  auto stream = to_stream(s);
  std::vector<array> inputs;
  inputs.reserve(gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    const auto& x = gradients[i];
    if (!issubdtype(x.dtype(), floating)) {
      std::ostringstream message;
      message << "[gradient_norm] gradient [" << i
              << "] must be of a real floating point type but is " << x.dtype();
      throw std::invalid_argument(message.str());
    }
    if (x.size() != 0) {
      inputs.push_back(x.dtype() == float64 ? astype(x, float32, stream) : x);
    }
  }
  if (inputs.empty()) {
    return {array(0.0f), array(false)};
  }
  array both({2}, float32, std::make_shared<GradientNorm>(stream), inputs);
  auto part = [&](int i) {
    return squeeze(slice(both, {i}, {i + 1}, stream), stream);
  };
  return {part(0), astype(part(1), bool_, stream)};
}

std::vector<array> GradientNorm::fallback(const std::vector<array>& inputs) {
  StreamContext context(stream());
  array squares(0.0f);
  array bad(false);
  for (const auto& x : inputs) {
    squares = squares + sum(square(astype(x, float32)));
    bad = logical_or(bad, any(logical_not(isfinite(x))));
  }
  return {stack({sqrt(squares), stop_gradient(astype(bad, float32))})};
}

} // namespace mlx_adadelta
