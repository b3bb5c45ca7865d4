#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "adadelta.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/version.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(MLX_ADADELTA_MODULE_NAME, m) {
  m.doc() = "Native kernels of mlx_adadelta.";

  // The types in the signatures below are registered by MLX itself.
  nb::module_::import_("mlx.core");

  m.attr("mlx_version") = MLX_ADADELTA_MLX_VERSION;
  m.attr("has_metal") = MLX_ADADELTA_HAS_METAL && mx::metal::is_available();

  m.def(
      "adadelta_update",
      [](const std::vector<mx::array>& parameters,
         const std::vector<mx::array>& gradients,
         const std::vector<mx::array>& v,
         const std::vector<mx::array>& u,
         const mx::array& learning_rate,
         double rho,
         double eps,
         double weight_decay,
         bool decoupled_weight_decay,
         std::vector<bool> decays,
         bool maximize,
         bool stochastic_rounding,
         uint64_t seed,
         std::optional<mx::array> step,
         std::optional<mx::array> gradient_scale,
         std::optional<mx::array> skip,
         mx::StreamOrDevice stream) {
        auto updates = mlx_adadelta::adadelta_update(
            parameters,
            gradients,
            v,
            u,
            learning_rate,
            {rho,
             eps,
             weight_decay,
             decoupled_weight_decay,
             std::move(decays),
             maximize,
             stochastic_rounding,
             seed,
             std::move(step),
             std::move(gradient_scale),
             std::move(skip)},
            stream);
        return nb::make_tuple(
            std::move(updates.parameters),
            std::move(updates.v),
            std::move(updates.u));
      },
      "parameters"_a,
      "gradients"_a,
      "v"_a,
      "u"_a,
      "learning_rate"_a,
      nb::kw_only(),
      "rho"_a,
      "eps"_a,
      "weight_decay"_a,
      "decoupled_weight_decay"_a,
      "decays"_a,
      "maximize"_a,
      "stochastic_rounding"_a,
      "seed"_a,
      "step"_a.none(),
      "gradient_scale"_a.none(),
      "skip"_a.none(),
      "stream"_a.none(),
      nb::sig(
          "def adadelta_update(parameters: list[mlx.core.array], "
          "gradients: list[mlx.core.array], v: list[mlx.core.array], "
          "u: list[mlx.core.array], learning_rate: mlx.core.array, *, "
          "rho: float, eps: float, weight_decay: float, "
          "decoupled_weight_decay: bool, decays: list[bool], maximize: bool, "
          "stochastic_rounding: bool, seed: int, "
          "step: mlx.core.array | None, "
          "gradient_scale: mlx.core.array | None, "
          "skip: mlx.core.array | None, "
          "stream: mlx.core.Stream | mlx.core.ThreadLocalStream | "
          "mlx.core.Device | mlx.core.DeviceType | "
          "None) -> tuple[list[mlx.core.array], list[mlx.core.array], "
          "list[mlx.core.array]]"),
      "One AdaDelta step over equally long lists; see "
      "mlx_adadelta.adadelta_update.");
}
