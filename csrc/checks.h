// The checks of the operation's arguments.

#pragma once

#include <cmath>
#include <optional>
#include <sstream>
#include <string>

#include "adadelta.h"
#include "mlx/utils.h"

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

// Throws one line: "NAME must ... but ...".
template <typename Error = std::invalid_argument, typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "[adadelta_update] ";
  (message << ... << parts);
  throw Error(message.str());
}

// A shape as Python writes it.
std::string text_of(const Shape& shape) {
  std::string sides;
  for (auto side : shape) {
    sides += (sides.empty() ? "" : ", ") + std::to_string(side);
  }
  return "(" + sides + (shape.size() == 1 ? ",)" : ")");
}

void check_options(const AdaDeltaOptions& options) {
  // Check the float32 numbers that the kernels get: a double may become 0 or
  // infinite.
  auto rho = static_cast<float>(options.rho);
  auto eps = static_cast<float>(options.eps);
  auto decay = static_cast<float>(options.weight_decay);
  if (!(rho >= 0 && rho <= 1)) {
    refuse("rho must be in [0, 1] but is ", options.rho);
  }
  if (!(eps > 0 && std::isfinite(eps))) {
    refuse("eps must be positive and finite but is ", options.eps);
  }
  if (!(decay >= 0 && std::isfinite(decay))) {
    refuse(
        "weight_decay must be finite and not negative but is ",
        options.weight_decay);
  }
  auto type = options.state_dtype.value_or(float32);
  if (find_types(float32, float32, type) < 0) {
    refuse<WrongType>(
        "state_dtype must be float32, float16 or bfloat16 but is ", type);
  }
}

void check_scalar(const char* name, const std::optional<array>& x) {
  if (x && (x->ndim() != 0 || issubdtype(x->dtype(), complexfloating))) {
    refuse(
        name,
        " must be a real scalar but has shape ",
        text_of(x->shape()),
        " and type ",
        x->dtype());
  }
}

void check_length(const char* name, size_t length, size_t parameters) {
  if (length != parameters) {
    refuse(name, " must be ", parameters, " long but is ", length);
  }
}

void check_tensor(
    const char* kind,
    const array& x,
    const array& w,
    const AdaDeltaOptions& options,
    size_t i) {
  bool is_parameter = &x == &w;
  if (!issubdtype(x.dtype(), floating) ||
      (is_parameter && x.dtype() == float64)) {
    refuse<WrongType>(
        argument_name(kind, options, i),
        " must be of a real floating point type",
        is_parameter ? " of at most 32 bits" : "",
        " but is ",
        x.dtype(),
        is_parameter ? "; freeze it to leave it out" : "");
  }
  if (x.shape() != w.shape()) {
    refuse(
        argument_name(kind, options, i),
        " must have the parameter's shape ",
        text_of(w.shape()),
        " but has ",
        text_of(x.shape()));
  }
}

// Checks the types of the new v and u. No kernel has two types of state.
void check_state(
    const array& w,
    const array& v,
    const array& u,
    const AdaDeltaOptions& options,
    size_t i) {
  auto type = options.state_dtype;
  if (type && *type != float32 && *type != w.dtype() && w.dtype() != float32) {
    refuse(
        "state_dtype must be float32 or the type of ",
        argument_name("parameter", options, i),
        " (",
        w.dtype(),
        ") but is ",
        *type);
  }
  if (options.stochastic_rounding && !type && v.dtype() != u.dtype()) {
    refuse<WrongType>(
        argument_name("v and u", options, i),
        " must be of one type for stochastic rounding but are ",
        v.dtype(),
        " and ",
        u.dtype());
  }
}

} // namespace

} // namespace mlx_adadelta
