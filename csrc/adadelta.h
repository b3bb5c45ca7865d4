// The fused AdaDelta update as an MLX operation.

#pragma once

#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "adadelta_step.h"
#include "fallback.h"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace mlx_adadelta {

namespace mx = mlx::core;

/** New parameters, v and u, each as long as the lists they were made from. */
struct AdaDeltaUpdates {
  std::vector<mx::array> parameters;
  std::vector<mx::array> v;
  std::vector<mx::array> u;
};

/** The options of an update. The defaults give the plain rule. */
struct AdaDeltaOptions {
  double rho = 0.9;
  double eps = 1e-6;
  double weight_decay = 0.0;
  bool decoupled_weight_decay = false;
  // Whether each parameter decays; all do if it is empty.
  std::vector<bool> decays;
  bool maximize = false;
  // The type of the new v and u: float32, the parameter's type, or 16 bits
  // beside a float32 parameter. Without a value each keeps its own type.
  std::optional<mx::Dtype> state_dtype;
  bool stochastic_rounding = false;
  uint64_t seed = 0;
  // Scalars that are read when the update runs: the step (for stochastic
  // rounding), a factor of every gradient, and whether to change nothing.
  std::optional<mx::array> step;
  std::optional<mx::array> gradient_scale;
  std::optional<mx::array> skip;
  // Returns the path of parameter i for messages. Without it the path is "[i]".
  std::function<std::string(size_t)> path;
};

/** Thrown if an argument has the wrong type. */
struct WrongType : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/** The argument's name in messages: "v of PATH", or "v" if PATH is empty. */
std::string
argument_name(std::string kind, const AdaDeltaOptions& options, size_t i);

/**
 * One AdaDelta step (Zeiler 2012, algorithm 1) over a list of parameters.
 *
 * gradients[i], v[i] and u[i] have the shape of parameters[i]. Parameters are
 * float32, float16 or bfloat16, the rest of any real floating point type; every
 * output has the type of its input, arithmetic is float32. learning_rate is a
 * real scalar.
 *
 * Throws std::invalid_argument when an argument does not fit, WrongType where
 * its type does not; nothing is changed then.
 */
AdaDeltaUpdates adadelta_update(
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const std::vector<mx::array>& v,
    const std::vector<mx::array>& u,
    const mx::array& learning_rate,
    const AdaDeltaOptions& options = {},
    mx::StreamOrDevice s = {});

/**
 * The same without the checks of options and scalars: Python checks those when
 * they are set. Tensors are checked.
 */
AdaDeltaUpdates update_tensors(
    const std::vector<mx::array>& parameters,
    const std::vector<mx::array>& gradients,
    const std::vector<mx::array>& v,
    const std::vector<mx::array>& u,
    const mx::array& learning_rate,
    const AdaDeltaOptions& options,
    mx::StreamOrDevice s);

/** The index in ADADELTA_FOR_EACH_TYPES of these types, or -1. */
int find_types(mx::Dtype w, mx::Dtype g, mx::Dtype state);

/** These types in a kernel's name: "float32_float32_float32". */
const char* types_name(int types);

/**
 * Updates a group of parameters in one evaluation.
 *
 * Inputs: the learning rate, alone or with gradient scale, skip and step; then
 * w, g, v, u of each parameter.
 * Outputs: w, v, u of each parameter.
 */
class AdaDeltaUpdate : public FallbackPrimitive {
 public:
  static constexpr size_t kScalars = 4;

  AdaDeltaUpdate(
      mx::Stream stream,
      std::vector<AdaDeltaParams> params,
      bool inputs_are_complete)
      : FallbackPrimitive(stream),
        params_(std::move(params)),
        inputs_are_complete_(inputs_are_complete) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;
  void eval_gpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override;

  const char* name() const override {
    return "AdaDeltaUpdate";
  }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(
      const std::vector<mx::array>& inputs) override;

 private:
  // Scalar i: the learning rate, gradient scale, skip or step.
  const mx::array& scalar(const std::vector<mx::array>& inputs, size_t i) const;
  std::vector<mx::array> fallback(
      const std::vector<mx::array>& inputs) override;

  std::vector<AdaDeltaParams> params_; // one for each parameter
  // When this was built they had been computed, not only scheduled. Evaluation
  // cannot tell: an array of the same mx.eval looks as one of an earlier one.
  bool inputs_are_complete_;
};

} // namespace mlx_adadelta
