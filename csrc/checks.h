// The checks of the operation's arguments. A failed one throws one line: "NAME
// must
// ... but ...".

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

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// As Python writes it.
std::string text_of(const Shape& shape) {
  std::string sides;
  for (auto side : shape) {
    sides += (sides.empty() ? "" : ", ") + std::to_string(side);
  }
  return "(" + sides + (shape.size() == 1 ? ",)" : ")");
}

template <typename Error = std::invalid_argument>
[[noreturn]] void refuse(
    const std::string& name,
    const std::string& must,
    const std::string& but) {
  throw Error(text("[adadelta_update] ", name, " must ", must, " but ", but));
}

void check_options(const AdaDeltaOptions& options) {
  auto check = [](auto name, double value, auto must, auto accept) {
    // As the kernels get it: a double may become 0 or infinite in float32.
    auto x = static_cast<float>(value);
    if (!std::isfinite(x) || !accept(x)) {
      refuse(name, must, text("is ", value));
    }
  };
  check("rho", options.rho, "be in [0, 1]", [](float x) {
    return x >= 0 && x <= 1;
  });
  check("eps", options.eps, "be positive and finite (>0)", [](float x) {
    return x > 0;
  });
  check(
      "weight_decay",
      options.weight_decay,
      "be finite and not negative",
      [](float x) { return x >= 0; });
  auto type = options.state_dtype.value_or(float32);
  if (find_types(float32, float32, type) < 0) {
    refuse<WrongType>(
        "state_dtype", "be float32, float16 or bfloat16", text("is ", type));
  }
}

void check_scalar(const char* name, const std::optional<array>& x) {
  if (x && (x->ndim() != 0 || issubdtype(x->dtype(), complexfloating))) {
    auto got =
        text("has shape ", text_of(x->shape()), " and type ", x->dtype());
    refuse(name, "be a real scalar", got);
  }
}

void check_length(const char* name, size_t length, size_t parameters) {
  if (length != parameters) {
    refuse(name, text("be ", parameters, " long"), text("is ", length));
  }
}

void check_tensor(
    const char* kind,
    const array& x,
    const array& w,
    const AdaDeltaOptions& options,
    size_t i) {
  auto name = [&] { return argument_name(kind, options, i); };
  if (!issubdtype(x.dtype(), floating)) {
    bool is_parameter = &x == &w;
    refuse<WrongType>(
        name(),
        "be of a real floating point type",
        text(
            "is ",
            x.dtype(),
            is_parameter ? "; freeze it to leave it out" : ""));
  }
  if (x.shape() != w.shape()) {
    refuse(
        name(),
        "have the parameter's shape " + text_of(w.shape()),
        "has " + text_of(x.shape()));
  }
}

// State as an update leaves it: no kernel has two types of state.
void check_state(
    const array& w,
    const array& v,
    const array& u,
    const AdaDeltaOptions& options,
    size_t i) {
  auto type = options.state_dtype;
  if (type && *type != float32 && *type != w.dtype() && w.dtype() != float32) {
    auto parameter = argument_name("parameter", options, i);
    refuse(
        "state_dtype",
        text("be float32 or the type of ", parameter, " (", w.dtype(), ")"),
        text("is ", *type));
  }
  if (options.stochastic_rounding && !type && v.dtype() != u.dtype()) {
    refuse<WrongType>(
        argument_name("v and u", options, i),
        "be of one type for stochastic rounding",
        text("are ", v.dtype(), " and ", u.dtype()));
  }
}

} // namespace

} // namespace mlx_adadelta
