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
// outputs, its cost per primitive is fixed; docs/benchmarks.md has the figures.
constexpr size_t kGroupSize = 2;

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

// What stands for scalars that were left out. Made once and never destroyed: a
// step allocates nothing, and MLX may be gone when static objects are.
const std::vector<array>& neutral_scalars() {
  static const auto* neutral = new std::vector<array>{
      array(1.0f), array(1.0f), array(false), array(uint64_t{0})};
  return *neutral;
}

// The scalars of an update as the kernels read them: the first alone where the
// others are neutral, since every input costs each output a reference.
std::vector<array> scalar_inputs(
    const array& learning_rate,
    const AdaDeltaOptions& options,
    Stream stream) {
  auto scalar = [&](const char* name, const array& x, size_t i) {
    check_scalar(name, x);
    return astype(x, neutral_scalars()[i].dtype(), stream);
  };
  std::vector<array> scalars{scalar("learning_rate", learning_rate, 0)};
  if (options.gradient_scale || options.skip || options.step) {
    auto optional =
        [&](const char* name, const std::optional<array>& x, size_t i) {
          scalars.push_back(x ? scalar(name, *x, i) : neutral_scalars()[i]);
        };
    optional("gradient_scale", options.gradient_scale, 1);
    optional("skip", options.skip, 2);
    optional("step", options.step, 3);
  }
  return scalars;
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

// Makes the outputs of one primitive each other's siblings, as
// array::make_arrays does at twice the cost.
void make_siblings(std::vector<array>& outputs) {
  for (auto out = outputs.begin(); out != outputs.end(); ++out) {
    std::vector<array> siblings;
    siblings.reserve(outputs.size() - 1);
    siblings.insert(siblings.end(), outputs.begin(), out);
    siblings.insert(siblings.end(), out + 1, outputs.end());
    out->set_siblings(std::move(siblings), out - outputs.begin());
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
    const AdaDeltaOptions& options /* = {} */,
    StreamOrDevice s /* = {} */) {
  check_list("parameters", parameters, parameters);
  check_list("gradients", gradients, parameters);
  check_list("v", v, parameters);
  check_list("u", u, parameters);
  check_options(options, parameters.size());
  for (size_t i = 0; options.stochastic_rounding && i < v.size(); ++i) {
    // No kernel has two types of state; a cast afterwards rounds to nearest.
    if (v[i].dtype() != u[i].dtype()) {
      refuse(
          "v[",
          i,
          "] and u[",
          i,
          "] must be of one type to be rounded stochastically but are ",
          v[i].dtype(),
          " and ",
          u[i].dtype(),
          ".");
    }
  }

  auto stream = to_stream(s);
  const auto scalars = scalar_inputs(learning_rate, options, stream);
  auto cast = [&](const array& x, Dtype type) {
    return x.dtype() == type ? x : astype(x, type, stream);
  };

  // State of a type without a kernel, which float32 need not hold exactly.
  auto take_back = [&](const array& x, const array& old) {
    bool inexact = old.dtype() == float64 && options.skip;
    auto y = cast(x, old.dtype());
    return inexact ? where(*options.skip, old, y, stream) : y;
  };

  AdaDeltaUpdates updates;
  for (auto* list : {&updates.parameters, &updates.v, &updates.u}) {
    list->reserve(parameters.size());
  }
  for (size_t begin = 0; begin < parameters.size(); begin += kGroupSize) {
    size_t end = std::min(begin + kGroupSize, parameters.size());
    auto inputs = scalars;
    inputs.reserve(scalars.size() + 4 * (end - begin));
    std::vector<AdaDeltaParams> params;
    params.reserve(end - begin);
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
      inputs.push_back(parameters[i]);
      inputs.push_back(cast(gradients[i], g_type));
      inputs.push_back(cast(v[i], state_type));
      inputs.push_back(cast(u[i], state_type));
      params.push_back(make_params(options, i));
    }
    auto primitive = std::make_shared<AdaDeltaUpdate>(stream, params);
    std::vector<array> outputs;
    outputs.reserve(3 * params.size());
    for (size_t i = begin; i < end; ++i) {
      const auto* wgvu = &inputs[scalars.size() + 4 * (i - begin)];
      for (const auto* old : {&wgvu[0], &wgvu[2], &wgvu[3]}) {
        outputs.emplace_back(old->shape(), old->dtype(), primitive, inputs);
      }
    }
    make_siblings(outputs);
    for (size_t i = begin; i < end; ++i) {
      const auto* out = &outputs[3 * (i - begin)];
      updates.parameters.push_back(out[0]);
      updates.v.push_back(take_back(out[1], v[i]));
      updates.u.push_back(take_back(out[2], u[i]));
    }
  }
  return updates;
}

const array& AdaDeltaUpdate::scalar(const std::vector<array>& inputs, size_t i)
    const {
  bool given = i < inputs.size() - 4 * params_.size();
  return given ? inputs[i] : neutral_scalars()[i];
}

std::vector<array> AdaDeltaUpdate::fallback(const std::vector<array>& inputs) {
  StreamContext context(stream());
  const auto& skip = scalar(inputs, 2);
  std::vector<array> outputs;
  const auto* tensors = inputs.data() + inputs.size() - 4 * params_.size();
  for (size_t i = 0; i < params_.size(); ++i) {
    if (params_[i].stochastic) {
      throw std::invalid_argument(
          "[AdaDeltaUpdate] Stochastic rounding has no derivative and no "
          "batch; "
          "transform the update without it.");
    }
    const auto* wgvu = tensors + 4 * i;
    auto next = adadelta_step<array>(
        astype(wgvu[0], float32),
        astype(wgvu[1], float32),
        astype(wgvu[2], float32),
        astype(wgvu[3], float32),
        scalar(inputs, 0),
        scalar(inputs, 1),
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
  // Another copy of this library may have a class of this name: the same
  // literal means the same copy.
  if (other.name() != name()) {
    return false;
  }
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
  for (size_t i = inputs.size() - 4 * params_.size(); i < inputs.size();
       i += 4) {
    shapes.insert(shapes.end(), 3, inputs[i].shape());
  }
  return shapes;
}

} // namespace mlx_adadelta
