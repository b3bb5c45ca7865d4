// Gives the C++ interface wrong arguments: what Python checks before it calls,
// C++ callers do not. A failed check ends the program.

#include <stdexcept>
#include <utility>
#include <vector>

#include "adadelta.h"
#include "mlx/mlx.h"
#include "require.h"

using namespace mlx::core;

namespace {

struct Arguments {
  array w = zeros({2}), lr = array(1.0f);
  std::vector<array> g{w}, v{w}, u{w};
  mlx_adadelta::AdaDeltaOptions options{};
};

bool is_refused(const Arguments& a) {
  try {
    mlx_adadelta::adadelta_update({a.w}, a.g, a.v, a.u, a.lr, a.options);
    return false;
  } catch (const std::invalid_argument&) {
    return true;
  }
}

} // namespace

int main() {
  using Set = void (*)(Arguments&);
  const std::pair<const char*, Set> refused[] = {
      {"no gradients", [](Arguments& a) { a.g.clear(); }},
      {"no v", [](Arguments& a) { a.v.clear(); }},
      {"no u", [](Arguments& a) { a.u.clear(); }},
      {"learning rate", [](Arguments& a) { a.lr = a.w; }},
      {"rho", [](Arguments& a) { a.options.rho = 1.5; }},
      {"eps", [](Arguments& a) { a.options.eps = 0; }},
      {"eps, 0 in float32", [](Arguments& a) { a.options.eps = 1e-46; }},
      {"eps, infinite in float32", [](Arguments& a) { a.options.eps = 1e39; }},
      {"decay", [](Arguments& a) { a.options.weight_decay = -1; }},
      {"infinite decay", [](Arguments& a) { a.options.weight_decay = 1e39; }},
      {"state_dtype", [](Arguments& a) { a.options.state_dtype = int32; }},
      {"decays", [](Arguments& a) { a.options.decays = {true, false}; }},
      {"skip", [](Arguments& a) { a.options.skip = a.w; }},
      {"step", [](Arguments& a) { a.options.step = a.w; }},
      {"scale", [](Arguments& a) { a.options.gradient_scale = a.w; }}};
  require(!is_refused({}), "refused: nothing wrong");
  for (const auto& [what, set] : refused) {
    Arguments a;
    set(a);
    require(is_refused(a), "not refused: ", what);
  }
}
