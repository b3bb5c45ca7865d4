#include "adadelta.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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

void check_scalar(const char* name, const array& x) {
  if (x.ndim() != 0 || issubdtype(x.dtype(), complexfloating)) {
    refuse(
        name,
        " must be a real scalar but has shape ",
        x.shape(),
        " and type ",
        x.dtype(),
        ".");
  }
}

void check_options(const AdaDeltaOptions& options, size_t parameters) {
  if (!(options.rho >= 0 && options.rho <= 1)) {
    refuse("rho must lie in [0, 1] but is ", options.rho, ".");
  }
  if (!(options.eps > 0 && std::isfinite(options.eps))) {
    refuse("eps must be positive and finite but is ", options.eps, ".");
  }
  if (!(options.weight_decay >= 0 && std::isfinite(options.weight_decay))) {
    refuse(
        "weight_decay must be finite and not negative but is ",
        options.weight_decay,
        ".");
  }
  if (!options.decays.empty() && options.decays.size() != parameters) {
    refuse(
        "decays must be as many as parameters (",
        parameters,
        ") but there are ",
        options.decays.size(),
        ".");
  }
}

// The scalars of an update as the kernels read them.
std::vector<array> scalar_inputs(
    const array& learning_rate,
    const AdaDeltaOptions& options,
    Stream stream) {
  // Made once and never destroyed: a step allocates nothing, and MLX may be
  // gone when static objects are.
  static const auto* neutral =
      new std::vector<array>{array(1.0f), array(false), array(uint64_t{0})};
  auto scalar = [&](const char* name, const array& x, Dtype type) {
    check_scalar(name, x);
    return astype(x, type, stream);
  };
  auto optional = [&](const char* name,
                      const std::optional<array>& x,
                      const array& otherwise) {
    return x ? scalar(name, *x, otherwise.dtype()) : otherwise;
  };
  return {
      scalar("learning_rate", learning_rate, float32),
      optional("gradient_scale", options.gradient_scale, (*neutral)[0]),
      optional("skip", options.skip, (*neutral)[1]),
      optional("step", options.step, (*neutral)[2])};
}

AdaDeltaParams make_params(const AdaDeltaOptions& options, size_t tensor) {
  bool decays = options.decays.empty() || options.decays[tensor];
  auto decay = static_cast<float>(decays ? options.weight_decay : 0.0);
  AdaDeltaParams params{};
  params.rho = static_cast<float>(options.rho);
  params.one_minus_rho = static_cast<float>(1.0 - options.rho);
  params.eps = static_cast<float>(options.eps);
  params.sign = options.maximize ? -1.0f : 1.0f;
  (options.decoupled_weight_decay ? params.decoupled_decay
                                  : params.weight_decay) = decay;
  params.stochastic = options.stochastic_rounding;
  params.seed[0] = static_cast<unsigned int>(options.seed);
  params.seed[1] = static_cast<unsigned int>(options.seed >> 32);
  params.tensor = static_cast<unsigned int>(tensor);
  return params;
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
    const AdaDeltaOptions& options /* = {} */,
    StreamOrDevice s /* = {} */) {
  check_list("parameters", parameters, parameters);
  check_list("gradients", gradients, parameters);
  check_list("v", v, parameters);
  check_list("u", u, parameters);
  check_options(options, parameters.size());

  auto stream = to_stream(s);
  const auto scalars = scalar_inputs(learning_rate, options, stream);

  AdaDeltaUpdates updates;
  for (auto* list : {&updates.parameters, &updates.v, &updates.u}) {
    list->reserve(parameters.size());
  }
  for (size_t begin = 0; begin < parameters.size(); begin += kGroupSize) {
    size_t end = std::min(begin + kGroupSize, parameters.size());
    auto inputs = scalars;
    std::vector<Shape> shapes;
    std::vector<Dtype> dtypes;
    std::vector<AdaDeltaParams> params;
    for (size_t i = begin; i < end; ++i) {
      auto w_type = parameters[i].dtype();
      // A type without a kernel of its own goes through float32, which holds
      // every value of theirs: the result is the same, one cast later.
      auto state_type = v[i].dtype() == u[i].dtype() ? v[i].dtype() : float32;
      if (find_types(w_type, float32, state_type) < 0) {
        state_type = float32;
      }
      auto g_type = gradients[i].dtype();
      if (find_types(w_type, g_type, state_type) < 0) {
        g_type = float32;
      }
      inputs.insert(
          inputs.end(),
          {parameters[i],
           astype(gradients[i], g_type, stream),
           astype(v[i], state_type, stream),
           astype(u[i], state_type, stream)});
      shapes.insert(shapes.end(), 3, parameters[i].shape());
      dtypes.insert(dtypes.end(), {w_type, state_type, state_type});
      params.push_back(make_params(options, i));
    }
    auto outputs = array::make_arrays(
        std::move(shapes),
        dtypes,
        std::make_shared<AdaDeltaUpdate>(stream, std::move(params)),
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
  const auto& lr = inputs[0];
  const auto& gradient_scale = inputs[1];
  const auto& skip = inputs[2];
  std::vector<array> outputs;
  for (size_t i = 0; i < params_.size(); ++i) {
    if (params_[i].stochastic) {
      throw std::invalid_argument(
          "[AdaDeltaUpdate] Stochastic rounding has no derivative and no "
          "batch; "
          "transform the update without it.");
    }
    const auto* wgvu = &inputs[kScalars + 4 * i];
    auto next = adadelta_step<array>(
        astype(wgvu[0], float32),
        astype(wgvu[1], float32),
        astype(wgvu[2], float32),
        astype(wgvu[3], float32),
        lr,
        gradient_scale,
        params_[i]);
    auto finish = [&](const array& old, const array& updated) {
      return where(skip, old, astype(updated, old.dtype()));
    };
    outputs.push_back(finish(wgvu[0], next.w));
    outputs.push_back(finish(wgvu[2], next.v));
    outputs.push_back(finish(wgvu[3], next.u));
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
  const auto& params = static_cast<const AdaDeltaUpdate&>(other).params_;
  // No padding: the struct is all 4-byte members.
  return params.size() == params_.size() &&
      std::memcmp(
          params.data(),
          params_.data(),
          params.size() * sizeof(AdaDeltaParams)) == 0;
}

std::vector<Shape> AdaDeltaUpdate::output_shapes(
    const std::vector<array>& inputs) {
  std::vector<Shape> shapes;
  for (size_t i = kScalars; i < inputs.size(); i += 4) {
    shapes.insert(shapes.end(), 3, inputs[i].shape());
  }
  return shapes;
}

} // namespace mlx_adadelta
