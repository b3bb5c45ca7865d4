#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "adadelta.h"
#include "mlx/backend/metal/metal.h"
#include "norm.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

namespace {

// The caller looks array_type up once for a list; nb::isinstance would look it
// up for each element.
bool is_array(nb::handle x, nb::handle array_type) {
  return PyObject_TypeCheck(
      x.ptr(), reinterpret_cast<PyTypeObject*>(array_type.ptr()));
}

// The arrays of a list. An error names the path of an element that is no array.
std::vector<mx::array> to_arrays(
    const char* kind,
    const nb::list& list,
    const mlx_adadelta::AdaDeltaOptions& options) {
  std::vector<mx::array> arrays;
  arrays.reserve(list.size());
  auto array_type = nb::type<mx::array>();
  for (nb::handle x : list) {
    if (!is_array(x, array_type)) {
      auto name = mlx_adadelta::argument_name(kind, options, arrays.size());
      nb::str type = x.type().attr("__name__");
      auto message = name + " must be an array but is " + type.c_str();
      throw nb::type_error(message.c_str());
    }
    arrays.push_back(*nb::inst_ptr<mx::array>(x));
  }
  return arrays;
}

// options is an mlx_adadelta.options.Options, which has checked its values.
nb::tuple adadelta_update(
    const nb::list& parameters,
    const nb::list& gradients,
    const nb::list& v,
    const nb::list& u,
    const mx::array& learning_rate,
    const nb::object& options,
    const nb::callable& path,
    std::vector<bool> decays,
    std::optional<mx::array> step,
    std::optional<mx::array> gradient_scale,
    std::optional<mx::array> skip,
    mx::StreamOrDevice stream) {
  auto number = [&](const char* name) {
    return nb::cast<double>(options.attr(name));
  };
  auto choice = [&](const char* name) {
    return nb::cast<bool>(options.attr(name));
  };
  mlx_adadelta::AdaDeltaOptions native{
      .rho = number("rho"),
      .eps = number("eps"),
      .weight_decay = number("weight_decay"),
      .decoupled_weight_decay = choice("decoupled_weight_decay"),
      .decays = std::move(decays),
      .maximize = choice("maximize"),
      .state_dtype =
          nb::cast<std::optional<mx::Dtype>>(options.attr("state_dtype")),
      .stochastic_rounding = choice("stochastic_rounding"),
      .seed = nb::cast<uint64_t>(options.attr("seed")),
      .step = std::move(step),
      .gradient_scale = std::move(gradient_scale),
      .skip = std::move(skip),
      .path = [&](size_t i) { return nb::cast<std::string>(path(i)); }};
  try {
    auto updates = mlx_adadelta::update_tensors(
        to_arrays("parameter", parameters, native),
        to_arrays("gradient", gradients, native),
        to_arrays("v", v, native),
        to_arrays("u", u, native),
        learning_rate,
        native,
        stream);
    return nb::make_tuple(
        std::move(updates.parameters),
        std::move(updates.v),
        std::move(updates.u));
  } catch (const mlx_adadelta::WrongType& error) {
    throw nb::type_error(error.what());
  }
}

// Whether any parameter is float64. No kernel computes in it.
bool has_float64(const nb::list& parameters) {
  auto array_type = nb::type<mx::array>();
  for (nb::handle x : parameters) {
    if (is_array(x, array_type) &&
        nb::inst_ptr<mx::array>(x)->dtype() == mx::float64) {
      return true;
    }
  }
  return false;
}

} // namespace

NB_MODULE(_ext, m) {
  m.doc() = "Native kernels of mlx_adadelta.";

  // MLX registers the types in the signatures below.
  nb::module_::import_("mlx.core");

  m.attr("has_metal") = MLX_ADADELTA_HAS_METAL && mx::metal::is_available();

  m.def(
      "adadelta_update",
      adadelta_update,
      "parameters"_a,
      "gradients"_a,
      "v"_a,
      "u"_a,
      "learning_rate"_a,
      "options"_a,
      nb::kw_only(),
      "path"_a,
      "decays"_a,
      "step"_a.none(),
      "gradient_scale"_a.none(),
      "skip"_a.none(),
      "stream"_a.none(),
      "One AdaDelta step over equally long lists; see "
      "mlx_adadelta.adadelta_update.");
  m.def("has_float64", has_float64, "parameters"_a);
  m.def(
      "norm",
      [](const std::vector<mx::array>& gradients, mx::StreamOrDevice stream) {
        return mlx_adadelta::gradient_norm(gradients, stream).first;
      },
      "gradients"_a,
      "stream"_a.none(),
      "The global norm.");
  m.def(
      "nonfinite",
      [](const std::vector<mx::array>& gradients, mx::StreamOrDevice stream) {
        return mlx_adadelta::gradient_norm(gradients, stream).second;
      },
      "gradients"_a,
      "stream"_a.none(),
      "Whether any gradient holds an infinity or a NaN.");
}
