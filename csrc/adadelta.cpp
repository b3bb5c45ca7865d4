#include "adadelta.h"

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "mlx_compat.h"

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

// Parameters in one primitive. MLX's bookkeeping is quadratic in the number of
// outputs; its cost per primitive is fixed. docs/benchmarks.md has the figures.
constexpr size_t kGroupSize = 2;

constexpr struct {
  Dtype w, g, state;
  const char* name;
} kTypes[] = {
#define ADADELTA_ROW(W, G, S) {W, G, S, #W "_" #G "_" #S},
    ADADELTA_FOR_EACH_TYPES(ADADELTA_ROW)
#undef ADADELTA_ROW
};

// The values of scalars that the caller left out. Made once, so that a step
// allocates nothing. Never destroyed: MLX may be destroyed first.
const std::vector<array>& neutral_scalars() {
  static const auto* neutral = new std::vector<array>{
      array(1.0f), array(1.0f), array(false), array(uint64_t{0})};
  return *neutral;
}

// The scalar inputs of an update. The learning rate comes alone if the others
// are neutral: each input costs every output a reference.
std::vector<array> scalar_inputs(
    const array& learning_rate,
    const AdaDeltaOptions& options,
    Stream stream) {
  const auto& neutral = neutral_scalars();
  std::vector<array> scalars{astype(learning_rate, neutral[0].dtype(), stream)};
  if (options.gradient_scale || options.skip || options.step) {
    for (const auto& x : {options.gradient_scale, options.skip, options.step}) {
      const auto& y = neutral[scalars.size()];
      scalars.push_back(x ? astype(*x, y.dtype(), stream) : y);
    }
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

// Whether the array has been computed and stays as it is: mx.compile replays a
// primitive with new inputs in place of those that have a primitive of their
// own.
bool is_complete(const array& x) {
  return kFinishesEvals && x.status() != array::Status::unscheduled &&
      !x.has_primitive() && !x.event().valid();
}

// Does the same as array::make_arrays at a lower cost.
std::vector<array> make_outputs(
    const std::vector<array>& inputs,
    std::vector<AdaDeltaParams> params,
    Stream stream) {
  size_t tensors = params.size();
  auto update = std::make_shared<AdaDeltaUpdate>(
      stream,
      std::move(params),
      std::all_of(inputs.begin(), inputs.end(), is_complete));
  std::vector<array> outputs;
  outputs.reserve(3 * tensors);
  for (size_t i = inputs.size() - 4 * tensors; i < inputs.size(); i += 4) {
    for (size_t old : {i, i + 2, i + 3}) {
      const auto& x = inputs[old];
      outputs.emplace_back(x.shape(), x.dtype(), update, inputs);
    }
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    auto siblings = outputs;
    siblings.erase(siblings.begin() + i);
    outputs[i].set_siblings(std::move(siblings), i);
  }
  return outputs;
}

// Compares first: a call of astype costs more, even if it does nothing.
array cast(const array& x, Dtype type, Stream stream) {
  return x.dtype() == type ? x : astype(x, type, stream);
}

// A kernel's new v or u in the type of the state.
array as_state(
    const array& x,
    const array& old,
    const AdaDeltaOptions& options,
    Stream stream) {
  auto y = cast(x, options.state_dtype.value_or(old.dtype()), stream);
  // The kernel's float32 may have rounded the old float64 value.
  bool inexact = y.dtype() == float64 && options.skip;
  return inexact ? where(*options.skip, old, y, stream) : y;
}

// The types of g and of the state that a kernel reads. Types without a kernel
// are cast to float32, which holds every 16-bit value: the result is the same
// after one more cast.
std::pair<Dtype, Dtype> kernel_types(Dtype w, Dtype g, Dtype v, Dtype u) {
  auto state = v == u && find_types(w, float32, v) >= 0 ? v : float32;
  return {find_types(w, g, state) >= 0 ? g : float32, state};
}

} // namespace

int find_types(Dtype w, Dtype g, Dtype state) {
  for (size_t i = 0; i < std::size(kTypes); ++i) {
    if (w == kTypes[i].w && g == kTypes[i].g && state == kTypes[i].state) {
      return i;
    }
  }
  return -1;
}

const char* types_name(int types) {
  return kTypes[types].name;
}

std::string
argument_name(std::string kind, const AdaDeltaOptions& options, size_t i) {
  auto path = options.path ? options.path(i) : "[" + std::to_string(i) + "]";
  if (!path.empty()) {
    kind += (kind == "parameter" ? " " : " of ") + path;
  }
  return kind;
}

AdaDeltaUpdates adadelta_update(
    const std::vector<array>& parameters,
    const std::vector<array>& gradients,
    const std::vector<array>& v,
    const std::vector<array>& u,
    const array& learning_rate,
    const AdaDeltaOptions& options /* = {} */,
    StreamOrDevice s /* = {} */) {
  check_options(options);
  check_scalar("learning_rate", learning_rate);
  check_scalar("gradient_scale", options.gradient_scale);
  check_scalar("skip", options.skip);
  check_scalar("step", options.step);
  check_length("gradients", gradients.size(), parameters.size());
  check_length("v", v.size(), parameters.size());
  check_length("u", u.size(), parameters.size());
  if (!options.decays.empty()) {
    check_length("decays", options.decays.size(), parameters.size());
  }
  return update_tensors(parameters, gradients, v, u, learning_rate, options, s);
}

AdaDeltaUpdates update_tensors(
    const std::vector<array>& parameters,
    const std::vector<array>& gradients,
    const std::vector<array>& v,
    const std::vector<array>& u,
    const array& learning_rate,
    const AdaDeltaOptions& options,
    StreamOrDevice s) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& w = parameters[i];
    check_tensor("parameter", w, w, options, i);
    check_tensor("gradient", gradients[i], w, options, i);
    check_tensor("v", v[i], w, options, i);
    check_tensor("u", u[i], w, options, i);
    check_state(w, v[i], u[i], options, i);
  }
  auto stream = to_stream(s);
  const auto scalars = scalar_inputs(learning_rate, options, stream);
  AdaDeltaUpdates updates;
  for (auto* list : {&updates.parameters, &updates.v, &updates.u}) {
    list->reserve(parameters.size());
  }
  for (size_t begin = 0; begin < parameters.size(); begin += kGroupSize) {
    size_t end = std::min(begin + kGroupSize, parameters.size());
    auto inputs = scalars;
    inputs.reserve(scalars.size() + 4 * (end - begin));
    std::vector<AdaDeltaParams> params;
    for (size_t i = begin; i < end; ++i) {
      auto [g_type, state_type] = kernel_types(
          parameters[i].dtype(),
          gradients[i].dtype(),
          options.state_dtype.value_or(v[i].dtype()),
          options.state_dtype.value_or(u[i].dtype()));
      inputs.push_back(parameters[i]);
      inputs.push_back(cast(gradients[i], g_type, stream));
      inputs.push_back(cast(v[i], state_type, stream));
      inputs.push_back(cast(u[i], state_type, stream));
      params.push_back(make_params(options, i));
    }
    auto outputs = make_outputs(inputs, std::move(params), stream);
    auto out = outputs.begin();
    for (size_t i = begin; i < end; ++i, out += 3) {
      updates.parameters.push_back(out[0]);
      updates.v.push_back(as_state(out[1], v[i], options, stream));
      updates.u.push_back(as_state(out[2], u[i], options, stream));
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
  bool may_skip = inputs.size() > 1 + 4 * params_.size();
  std::vector<array> outputs;
  const auto* old = inputs.data() + inputs.size() - 4 * params_.size();
  for (const auto& params : params_) {
    if (params.stochastic) {
      throw std::invalid_argument(
          "[AdaDeltaUpdate] stochastic_rounding must be false under vmap and "
          "derivatives but is true.");
    }
    auto next = adadelta_step<array>(
        astype(old[0], float32),
        astype(old[1], float32),
        astype(old[2], float32),
        astype(old[3], float32),
        scalar(inputs, 0),
        scalar(inputs, 1),
        params);
    auto add = [&](const array& x, const array& new_x) {
      auto y = astype(new_x, x.dtype());
      outputs.push_back(may_skip ? where(scalar(inputs, 2), x, y) : y);
    };
    add(old[0], next.w);
    add(old[2], next.v);
    add(old[3], next.u);
    old += 4;
  }
  return outputs;
}

bool AdaDeltaUpdate::is_equivalent(const Primitive& other) const {
  // Another copy of this library may have a class of this name. The pointer to
  // the literal differs between copies.
  if (other.name() != name()) {
    return false;
  }
  const auto& params = static_cast<const AdaDeltaUpdate&>(other).params_;
  // All members have 4 bytes, so the struct has no padding.
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
