#include "adadelta.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

// Parameters in one primitive. MLX's bookkeeping is quadratic in the number of
// outputs, its cost per primitive is fixed; docs/benchmarks.md has the curve.
constexpr size_t kGroupSize = 4;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "[adadelta_update] ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

void check_list(
    const char* name,
    const std::vector<array>& xs,
    const std::vector<array>& parameters) {
  if (xs.size() != parameters.size()) {
    refuse(
        name,
        " must be as many as parameters (",
        parameters.size(),
        ") but there are ",
        xs.size(),
        ".");
  }
  for (size_t i = 0; i < xs.size(); ++i) {
    if (xs[i].shape() != parameters[i].shape()) {
      refuse(
          name,
          "[",
          i,
          "] must have the parameter's shape ",
          parameters[i].shape(),
          " but has ",
          xs[i].shape(),
          ".");
    }
    if (!issubdtype(xs[i].dtype(), floating)) {
      refuse(
          name,
          "[",
          i,
          "] must be of a real floating point type but is ",
          xs[i].dtype(),
          ".");
    }
    if (parameters[i].dtype() == float64) {
      refuse("parameters[", i, "] is float64, which no kernel computes in.");
    }
  }
}

void check_hyper_parameters(const array& lr, double rho, double eps) {
  if (lr.ndim() != 0 || issubdtype(lr.dtype(), complexfloating)) {
    refuse(
        "learning_rate must be a real scalar but has shape ",
        lr.shape(),
        " and type ",
        lr.dtype(),
        ".");
  }
  if (!(rho >= 0 && rho <= 1)) {
    refuse("rho must lie in [0, 1] but is ", rho, ".");
  }
  if (!(eps > 0 && std::isfinite(eps))) {
    refuse("eps must be positive and finite but is ", eps, ".");
  }
}

} // namespace

int find_types(Dtype w, Dtype g, Dtype state) {
  int index = 0;
#define ADADELTA_MATCH(W, G, S)         \
  if (w == W && g == G && state == S) { \
    return index;                       \
  }                                     \
  ++index;
  ADADELTA_FOR_EACH_TYPES(ADADELTA_MATCH)
#undef ADADELTA_MATCH
  return -1;
}

const char* types_name(int types) {
#define ADADELTA_NAME(W, G, S) #W "_" #G "_" #S,
  static constexpr const char* names[] = {
      ADADELTA_FOR_EACH_TYPES(ADADELTA_NAME)};
#undef ADADELTA_NAME
  return names[types];
}

AdaDeltaUpdates adadelta_update(
    const std::vector<array>& parameters,
    const std::vector<array>& gradients,
    const std::vector<array>& v,
    const std::vector<array>& u,
    const array& learning_rate,
    double rho /* = 0.9 */,
    double eps /* = 1e-6 */,
    StreamOrDevice s /* = {} */) {
  check_list("parameters", parameters, parameters);
  check_list("gradients", gradients, parameters);
  check_list("v", v, parameters);
  check_list("u", u, parameters);
  check_hyper_parameters(learning_rate, rho, eps);

  auto stream = to_stream(s);
  AdaDeltaParams params{
      static_cast<float>(rho),
      static_cast<float>(1.0 - rho),
      static_cast<float>(eps)};
  auto lr = astype(learning_rate, float32, stream);

  AdaDeltaUpdates updates;
  for (auto* list : {&updates.parameters, &updates.v, &updates.u}) {
    list->reserve(parameters.size());
  }
  for (size_t begin = 0; begin < parameters.size(); begin += kGroupSize) {
    size_t end = std::min(begin + kGroupSize, parameters.size());
    std::vector<array> inputs{lr};
    std::vector<Shape> shapes;
    std::vector<Dtype> dtypes;
    for (size_t i = begin; i < end; ++i) {
      auto g = gradients[i];
      auto new_v = v[i];
      auto new_u = u[i];
      auto w_type = parameters[i].dtype();
      // Types without a kernel of their own go through float32, which holds
      // every value of theirs: the result is the same, one cast later.
      if (v[i].dtype() != u[i].dtype() ||
          find_types(w_type, w_type, v[i].dtype()) < 0) {
        new_v = astype(new_v, float32, stream);
        new_u = astype(new_u, float32, stream);
      }
      if (find_types(w_type, g.dtype(), new_v.dtype()) < 0) {
        g = astype(g, float32, stream);
      }
      inputs.insert(inputs.end(), {parameters[i], g, new_v, new_u});
      shapes.insert(shapes.end(), 3, parameters[i].shape());
      dtypes.insert(dtypes.end(), {w_type, new_v.dtype(), new_u.dtype()});
    }
    auto outputs = array::make_arrays(
        std::move(shapes),
        dtypes,
        std::make_shared<AdaDeltaUpdate>(stream, params),
        inputs);
    for (size_t i = begin; i < end; ++i) {
      auto* out = &outputs[3 * (i - begin)];
      updates.parameters.push_back(out[0]);
      updates.v.push_back(astype(out[1], v[i].dtype(), stream));
      updates.u.push_back(astype(out[2], u[i].dtype(), stream));
    }
  }
  return updates;
}

std::vector<array> AdaDeltaUpdate::fallback(const std::vector<array>& inputs) {
  StreamContext context(stream());
  std::vector<array> outputs;
  for (size_t i = 1; i < inputs.size(); i += 4) {
    auto next = adadelta_step<array>(
        astype(inputs[i], float32),
        astype(inputs[i + 1], float32),
        astype(inputs[i + 2], float32),
        astype(inputs[i + 3], float32),
        inputs[0],
        params_);
    outputs.push_back(astype(next.w, inputs[i].dtype()));
    outputs.push_back(astype(next.v, inputs[i + 2].dtype()));
    outputs.push_back(astype(next.u, inputs[i + 3].dtype()));
  }
  return outputs;
}

std::pair<std::vector<array>, std::vector<int>> AdaDeltaUpdate::vmap(
    const std::vector<array>& inputs,
    const std::vector<int>& axes) {
  auto function = [this](const std::vector<array>& xs) { return fallback(xs); };
  auto outputs = mlx::core::vmap(function, axes)(inputs);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

std::vector<array> AdaDeltaUpdate::jvp(
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

std::vector<array> AdaDeltaUpdate::vjp(
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

bool AdaDeltaUpdate::is_equivalent(const Primitive& other) const {
  const auto& p = static_cast<const AdaDeltaUpdate&>(other).params_;
  return params_.rho == p.rho && params_.one_minus_rho == p.one_minus_rho &&
      params_.eps == p.eps;
}

std::vector<Shape> AdaDeltaUpdate::output_shapes(
    const std::vector<array>& inputs) {
  std::vector<Shape> shapes;
  for (size_t i = 1; i < inputs.size(); i += 4) {
    shapes.insert(shapes.end(), 3, inputs[i].shape());
  }
  return shapes;
}

} // namespace mlx_adadelta
