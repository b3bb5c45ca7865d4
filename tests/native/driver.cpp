// Runs the operation without Python, for sanitizers: scripts/sanitize.
//
// Every result is held bit for bit against a scalar loop over the elements in
// row-major order, which knows neither layouts nor threads.

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "adadelta.h"
#include "mlx/compile.h"
#include "mlx/ops.h"
#include "mlx/stream.h"
#include "mlx/transforms.h"
#include "mlx/utils.h"

namespace {

namespace mx = mlx::core;
using mlx_adadelta::adadelta_update;
using mlx_adadelta::AdaDeltaOptions;
using mx::array;

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

// --------------------------------- Tensors ----------------------------------

struct Types {
  mx::Dtype w, g, state;
};

std::vector<Types> kernel_types() {
  using mx::bfloat16, mx::float16, mx::float32;
#define ADADELTA_TYPES(W, G, S) {W, G, S},
  return {ADADELTA_FOR_EACH_TYPES(ADADELTA_TYPES)};
#undef ADADELTA_TYPES
}

const Types kFloat32{mx::float32, mx::float32, mx::float32};

using Layout = std::function<array(const array&)>;

array transposed(const array& x) {
  if (x.ndim() < 2) {
    return x;
  }
  return mx::swapaxes(mx::contiguous(mx::swapaxes(x, -1, -2)), -1, -2);
}

array column_contiguous(const array& x) {
  return mx::transpose(mx::contiguous(mx::transpose(x)));
}

array sliced(const array& x) {
  mx::Shape start(x.ndim(), 1);
  auto stop = x.shape();
  for (auto& n : stop) {
    ++n;
  }
  return mx::slice(mx::pad(x, std::pair<int, int>{1, 2}), start, stop);
}

array sliced_transposed(const array& x) {
  return x.ndim() < 2 ? sliced(x)
                      : mx::swapaxes(sliced(mx::swapaxes(x, -1, -2)), -1, -2);
}

array every_second(const array& x, int stride) {
  mx::Shape start(x.ndim(), 0);
  auto stop = x.shape();
  mx::Shape strides(x.ndim(), 1);
  if (stride < 0) {
    start.back() = stop.back() - 1;
    stop.back() = -stop.back() - 1;
  }
  strides.back() = stride;
  return mx::slice(x, start, stop, strides);
}

array strided(const array& x) {
  return x.ndim() == 0 ? x : every_second(mx::repeat(x, 2, -1), 2);
}

array reversed(const array& x) {
  if (x.size() == 0 || x.ndim() == 0) {
    return x;
  }
  return every_second(mx::contiguous(every_second(x, -1)), -1);
}

array broadcast(const array& x) {
  if (x.size() == 0 || x.ndim() == 0) {
    return x;
  }
  auto stop = x.shape();
  stop.back() = 1;
  auto first = mx::contiguous(mx::slice(x, mx::Shape(x.ndim(), 0), stop));
  return mx::broadcast_to(first, x.shape());
}

const std::map<std::string, Layout> kLayouts{
    {"same", [](const array& x) { return x; }},
    {"transposed", transposed},
    {"column-contiguous", column_contiguous},
    {"sliced", sliced},
    {"sliced transposed", sliced_transposed},
    {"strided", strided},
    {"reversed", reversed},
    {"broadcast", broadcast}};

struct Tensors {
  array w, g, v, u;
};

struct Layouts {
  std::string w = "same", g = "same", v = "same", u = "same";
};

Tensors make_tensors(
    const mx::Shape& shape,
    const Types& types = kFloat32,
    const Layouts& layouts = {},
    unsigned seed = 0) {
  std::mt19937 random(seed);
  size_t n = 1;
  for (int length : shape) {
    n *= length;
  }
  auto make = [&](mx::Dtype type, bool positive, const std::string& layout) {
    std::vector<float> values(n);
    for (auto& x : values) {
      // Not <random>'s distributions: theirs differ between libraries.
      x = static_cast<float>(static_cast<int>(random() >> 8) - (1 << 23));
      x = (positive ? std::abs(x) : x) / (1 << 22);
    }
    return kLayouts.at(layout)(
        mx::astype(array(values.begin(), shape, mx::float32), type));
  };
  Tensors t{
      make(types.w, false, layouts.w),
      make(types.g, false, layouts.g),
      make(types.state, true, layouts.v),
      make(types.state, true, layouts.u)};
  mx::eval(t.w, t.g, t.v, t.u);
  return t;
}

// --------------------------------- Expected ---------------------------------

// Offsets of an evaluated array's elements in row-major order.
std::vector<int64_t> offsets_of(const array& x) {
  std::vector<int64_t> offsets;
  mx::Shape index(x.ndim(), 0);
  for (size_t i = 0; i < x.size(); ++i) {
    int64_t offset = 0;
    for (size_t axis = 0; axis < x.ndim(); ++axis) {
      offset += index[axis] * x.strides(axis);
    }
    offsets.push_back(offset);
    for (int axis = x.ndim() - 1; axis >= 0 && ++index[axis] == x.shape(axis);
         --axis) {
      index[axis] = 0;
    }
  }
  return offsets;
}

// Where each element lies in the outputs: as in w, unless w has gaps, overlaps
// or runs backwards; then in row-major order.
std::vector<int64_t> places_of(const array& w) {
  auto places = offsets_of(w);
  std::vector<bool> taken(places.size());
  for (int64_t& place : places) {
    if (place < 0 || place >= std::ssize(places) || taken[place]) {
      std::iota(places.begin(), places.end(), 0);
      break;
    }
    taken[place] = true;
  }
  return places;
}

// An evaluated array's elements in row-major order.
std::vector<float> values_of(const array& x) {
  require(
      mx::issubdtype(x.dtype(), mx::floating) && x.itemsize() <= 4,
      "no test reads this type");
  std::vector<float> values;
  for (int64_t i : offsets_of(x)) {
    values.push_back(
        x.dtype() == mx::float16        ? float(x.data<mx::float16_t>()[i])
            : x.dtype() == mx::bfloat16 ? float(x.data<mx::bfloat16_t>()[i])
                                        : x.data<float>()[i]);
  }
  return values;
}

// Rounds to a type and back; stochastically where random bits are given.
float rounded(float x, mx::Dtype type, const unsigned int* random) {
  auto half_of = [](unsigned int half) {
    return static_cast<float>(
        std::bit_cast<mx::float16_t>(static_cast<uint16_t>(half)));
  };
  if (type == mx::float16) {
    return random ? half_of(mlx_adadelta::round_to_float16(x, *random))
                  : static_cast<float>(mx::float16_t(x));
  }
  if (type == mx::bfloat16) {
    return random ? std::bit_cast<float>(
                        mlx_adadelta::round_to_bfloat16(x, *random) << 16)
                  : static_cast<float>(mx::bfloat16_t(x));
  }
  return x;
}

struct Case {
  std::string name;
  std::vector<Tensors> tensors;
  AdaDeltaOptions options = {};
  float lr = 0.75f;
};

// New w, v and u of one tensor, elements in row-major order.
std::vector<std::vector<float>>
expect(const Tensors& t, size_t tensor, const Case& c) {
  auto w = values_of(t.w);
  auto g = values_of(t.g);
  auto v = values_of(t.v);
  auto u = values_of(t.u);
  const auto& o = c.options;
  if (o.skip && o.skip->item<bool>()) {
    return {w, v, u};
  }
  auto rho = static_cast<float>(o.rho);
  auto rest = static_cast<float>(1 - o.rho);
  auto eps = static_cast<float>(o.eps);
  auto decay = static_cast<float>(
      o.decays.empty() || o.decays[tensor] ? o.weight_decay : 0);
  float scale = o.gradient_scale ? o.gradient_scale->item<float>() : 1.0f;
  mlx_adadelta::AdaDeltaParams params{};
  params.seed[0] = static_cast<unsigned int>(o.seed);
  params.seed[1] = static_cast<unsigned int>(o.seed >> 32);
  params.tensor = static_cast<unsigned int>(tensor);
  uint64_t step = o.step ? o.step->item<uint64_t>() : 0;
  auto keys = mlx_adadelta::adadelta_keys(step, params);
  auto places = places_of(t.w);
  for (size_t i = 0; i < w.size(); ++i) {
    g[i] = scale * (o.maximize ? -g[i] : g[i]);
    if (decay != 0 && o.decoupled_weight_decay) {
      w[i] = w[i] - c.lr * decay * w[i];
    } else if (decay != 0) {
      g[i] = g[i] + decay * w[i];
    }
    v[i] = rho * v[i] + rest * (g[i] * g[i]);
    float d = std::sqrt(u[i] + eps) / std::sqrt(v[i] + eps) * g[i];
    u[i] = rho * u[i] + rest * (d * d);
    w[i] = w[i] - c.lr * d;
    auto hash = mlx_adadelta::hash_place(
        keys.place,
        static_cast<uint32_t>(places[i]),
        static_cast<uint32_t>(places[i] >> 32));
    unsigned random[] = {
        keys.w + hash * mlx_adadelta::kFactorW,
        keys.v + hash * mlx_adadelta::kFactorV,
        keys.u + hash * mlx_adadelta::kFactorU};
    bool stochastic = o.stochastic_rounding;
    w[i] = rounded(w[i], t.w.dtype(), stochastic ? &random[0] : nullptr);
    v[i] = rounded(v[i], t.v.dtype(), stochastic ? &random[1] : nullptr);
    u[i] = rounded(u[i], t.u.dtype(), stochastic ? &random[2] : nullptr);
  }
  return {w, v, u};
}

void compare(
    const array& actual,
    const std::vector<float>& expected,
    const std::string& name) {
  auto values = values_of(actual);
  require(values.size() == expected.size(), name, ": size");
  for (size_t i = 0; i < values.size(); ++i) {
    auto bits = std::bit_cast<uint32_t>(values[i]);
    require(
        bits == std::bit_cast<uint32_t>(expected[i]),
        name,
        ": element ",
        i,
        " is ",
        values[i],
        " where ",
        expected[i],
        " is right");
  }
}

mlx_adadelta::AdaDeltaUpdates update(const Case& c) {
  std::vector<array> lists[4];
  for (const auto& t : c.tensors) {
    const array* wgvu[] = {&t.w, &t.g, &t.v, &t.u};
    for (int i = 0; i < 4; ++i) {
      lists[i].push_back(*wgvu[i]);
    }
  }
  return adadelta_update(
      lists[0], lists[1], lists[2], lists[3], array(c.lr), c.options);
}

void evaluate(mlx_adadelta::AdaDeltaUpdates& updates) {
  auto all = updates.parameters;
  all.insert(all.end(), updates.v.begin(), updates.v.end());
  all.insert(all.end(), updates.u.begin(), updates.u.end());
  mx::eval(all);
}

using Expected = std::vector<std::vector<std::vector<float>>>;

Expected expect_all(const Case& c) {
  Expected expected;
  for (size_t i = 0; i < c.tensors.size(); ++i) {
    expected.push_back(expect(c.tensors[i], i, c));
  }
  return expected;
}

void compare_all(
    const mlx_adadelta::AdaDeltaUpdates& updates,
    const Expected& expected,
    const std::string& name) {
  for (size_t i = 0; i < expected.size(); ++i) {
    auto of = name + ", tensor " + std::to_string(i);
    compare(updates.parameters[i], expected[i][0], "w of " + of);
    compare(updates.v[i], expected[i][1], "v of " + of);
    compare(updates.u[i], expected[i][2], "u of " + of);
  }
}

// Twice: while the inputs are held, when they must keep their values, and with
// their memory given away.
void check(Case c) {
  auto expected = expect_all(c);
  {
    auto updates = update(c);
    evaluate(updates);
    compare_all(updates, expected, c.name);
  }
  auto updates = update(c); // would differ, had the inputs changed
  c.tensors.clear();
  evaluate(updates);
  compare_all(updates, expected, c.name + ", memory given away");
}

// ----------------------------------- Tests ----------------------------------

// Linear, and with a second thread; matrices inside a tile, with edges, in more
// than one strip and with a second thread; batches.
const std::vector<mx::Shape> kShapes{
    {},
    {0},
    {1},
    {7},
    {3, 0},
    {1, 9},
    {9, 1},
    {33, 65},
    {64, 64},
    {2, 31, 70},
    {300007},
    {523, 521},
    {9, 9001},
    {3, 300, 200}};

void test_types() {
  for (const auto& types : kernel_types()) {
    Case c{"types", {}};
    for (const auto& shape : {mx::Shape{1025}, mx::Shape{33, 65}}) {
      c.tensors.push_back(make_tensors(shape, types));
      c.tensors.push_back(make_tensors(shape, types, {.g = "transposed"}));
    }
    // More rows than one strip holds, whichever type is the narrower.
    c.tensors.push_back(
        make_tensors({131, 67}, types, {.v = "transposed", .u = "transposed"}));
    check(c);
  }
}

void test_shapes_and_layouts() {
  for (const auto& shape : kShapes) {
    for (const auto& [name, _] : kLayouts) {
      bool large = array(shape, mx::float32, nullptr, {}).size() > 50000;
      if (large && name != "same" && name != "transposed" &&
          name != "sliced transposed") {
        continue; // copied as small ones are
      }
      const std::map<std::string, Layouts> cases{
          {"gradients", {.g = name}},
          {"parameters", {.w = name}},
          {"state", {.v = name, .u = name}},
          {"all", {name, name, name, name}}};
      for (const auto& [what, layouts] : cases) {
        check({what + " " + name, {make_tensors(shape, kFloat32, layouts)}});
      }
    }
  }
}

void test_large_halves() {
  for (auto half : {mx::float16, mx::bfloat16}) {
    Types mixed{half, mx::float32, mx::float32};
    for (const auto& shape : {mx::Shape{300007}, mx::Shape{259, 1033}}) {
      for (const auto& x : {"same", "transposed"}) {
        check(
            {"large halves",
             {make_tensors(shape, {half, half, half}, {.g = x}),
              make_tensors(shape, mixed, {.w = x, .u = x})}});
      }
    }
  }
}

void test_groups() {
  auto types = kernel_types();
  for (size_t count : {0, 2, 5, 9}) {
    Case c{"a group of " + std::to_string(count), {}};
    for (size_t i = 0; i < count; ++i) {
      auto layout = i % 2 == 0 ? "same" : "transposed";
      int n = static_cast<int>(i);
      const auto& t = types[i % types.size()];
      c.tensors.push_back(make_tensors({n, 7 * n + 3}, t, {.g = layout}, n));
    }
    check(c);
  }
}

void test_memory_is_reused() {
  auto t = make_tensors({1000});
  const void* before[] = {t.w.data<void>(), t.v.data<void>(), t.u.data<void>()};
  std::vector<array> w{std::move(t.w)}, v{std::move(t.v)}, u{std::move(t.u)};
  auto updates = adadelta_update(w, {t.g}, v, u, array(1.0f));
  w.clear();
  v.clear();
  u.clear();
  evaluate(updates);
  require(updates.parameters[0].data<void>() == before[0], "w is elsewhere");
  require(updates.v[0].data<void>() == before[1], "v is elsewhere");
  require(updates.u[0].data<void>() == before[2], "u is elsewhere");
}

void test_one_array_in_many_places() {
  auto t = make_tensors({33, 65});
  auto square = make_tensors({64, 64});
  auto turned = mx::transpose(square.w);
  mx::eval(turned);
  check(
      {"aliases",
       {t,
        t,
        {t.w, t.w, t.v, t.u},
        {t.w, t.g, t.v, t.v},
        {t.v, t.v, t.v, t.v},
        {square.w, turned, square.v, square.v}}});
}

void test_options() {
  for (const auto& layout : {"same", "transposed"}) {
    std::vector<Tensors> tensors;
    for (unsigned i = 0; i < 3; ++i) {
      tensors.push_back(
          make_tensors({40, 70}, kFloat32, {.g = layout, .u = layout}, i));
    }
    AdaDeltaOptions o;
    o.weight_decay = 0.1;
    o.decays = {true, false, true};
    check({"weight decay", tensors, o});
    o.decoupled_weight_decay = true;
    o.maximize = true;
    o.gradient_scale = array(0.37f);
    check({"decoupled weight decay, maximized, scaled", tensors, o});
    o.skip = array(false);
    check({"not skipped", tensors, o});
    o.skip = array(true);
    check({"skipped", tensors, o});
  }
}

void test_stochastic_rounding() {
  AdaDeltaOptions o;
  o.stochastic_rounding = true;
  o.seed = (uint64_t{1} << 40) + 3;
  o.step = array(uint64_t{11});
  for (const auto& types : kernel_types()) {
    Case c{"stochastic rounding", {}, o};
    for (const auto& shape :
         {mx::Shape{1000}, mx::Shape{33, 65}, mx::Shape{2, 5, 64}}) {
      for (const auto& [name, _] : kLayouts) {
        c.tensors.push_back(
            make_tensors(shape, types, {name, name, name, name}));
        c.tensors.push_back(
            make_tensors(shape, types, {.w = name, .u = "transposed"}));
      }
    }
    check(c);
  }
  Types halves{mx::bfloat16, mx::bfloat16, mx::bfloat16};
  check({"stochastic rounding, threads", {make_tensors({300007}, halves)}, o});
}

void test_steps_follow_one_another() {
  auto t = make_tensors({257, 1031}, kFloat32, {.g = "transposed"});
  Case c{"steps", {t}};
  Expected expected;
  auto updates = update(c);
  for (int i = 0; i < 3; ++i) {
    expected = expect_all(c);
    evaluate(updates);
    compare_all(updates, expected, "step " + std::to_string(i));
    c.tensors = {{updates.parameters[0], t.g, updates.v[0], updates.u[0]}};
    updates = update(c);
  }
}

// Runs a function in so many threads at once, each with a stream of its own.
void in_threads(int count, const std::function<void(int)>& function) {
  std::vector<std::thread> threads;
  std::vector<std::string> errors(count);
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        mx::StreamContext context(mx::new_stream(mx::Device::cpu));
        function(i);
        mx::synchronize();
      } catch (const std::exception& error) {
        errors[i] = error.what();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& error : errors) {
    require(error.empty(), error);
  }
}

void test_streams_of_two_threads() {
  in_threads(2, [](int thread) {
    for (unsigned i = 0; i < 6; ++i) {
      auto layout = i % 2 == 0 ? "transposed" : "same";
      std::string name = "thread " + std::to_string(thread);
      check(
          {name,
           {make_tensors({521, 600}, kFloat32, {.g = layout}, i),
            make_tensors({300007}, kFloat32, {}, i),
            make_tensors({5}, kFloat32, {}, i)}});
    }
  });
}

// Streams belong to their threads: MLX throws where a primitive asks for one of
// another thread. The evaluation must be possible all the same afterwards.
void test_a_throw_within_an_evaluation() {
  for (const auto& layout : {"same", "transposed", "sliced"}) {
    Case c{"after a throw", {}};
    for (unsigned i = 0; i < 3; ++i) {
      c.tensors.push_back(
          make_tensors({3, 5}, kFloat32, {.g = layout, .u = layout}, i));
    }
    auto expected = expect_all(c);
    auto updates = update(c);
    for (int attempt = 0; attempt < 2; ++attempt) {
      std::atomic<bool> thrown = false;
      in_threads(1, [&](int) {
        try {
          mx::eval(updates.parameters[0]);
        } catch (const std::exception&) {
          thrown = true;
        }
      });
      require(thrown, "a foreign stream evaluated");
    }
    mx::eval(updates.u[1]); // not the output that failed
    evaluate(updates);
    compare_all(updates, expected, c.name);
  }
}

void test_refusals() {
  struct Arguments {
    array w, g, v, u, lr;
    AdaDeltaOptions options;
  };
  auto refused = [](const char* what, auto set) {
    array x = mx::zeros({2});
    Arguments a{x, x, x, x, array(1.0f), {}};
    set(a);
    try {
      adadelta_update({a.w}, {a.g}, {a.v}, {a.u}, a.lr, a.options);
    } catch (const std::invalid_argument&) {
      return;
    }
    require(false, "not refused: ", what);
  };
  auto cast = [](array& x, mx::Dtype type) { x = mx::astype(x, type); };
  refused("shape", [](auto& a) { a.g = a.lr; });
  refused("float64", [&](auto& a) { cast(a.w, mx::float64); });
  refused("integers", [&](auto& a) { cast(a.g, mx::int32); });
  refused("learning rate", [](auto& a) { a.lr = a.w; });
  refused("rho", [](auto& a) { a.options.rho = 1.5; });
  refused("eps", [](auto& a) { a.options.eps = 0; });
  refused("eps, 0 in float32", [](auto& a) { a.options.eps = 1e-46; });
  refused("eps, infinite in float32", [](auto& a) { a.options.eps = 1e39; });
  refused("weight_decay", [](auto& a) { a.options.weight_decay = -1; });
  refused("weight_decay, infinite in float32", [](auto& a) {
    a.options.weight_decay = 1e39;
  });
  refused("state_dtype", [](auto& a) { a.options.state_dtype = mx::int32; });
  refused("16-bit state of another 16-bit type", [&](auto& a) {
    cast(a.w, mx::bfloat16);
    a.options.state_dtype = mx::float16;
  });
  refused("decays", [](auto& a) { a.options.decays = {true, false}; });
  refused("skip", [](auto& a) { a.options.skip = a.w; });
  refused("two types of state", [&](auto& a) {
    cast(a.v, mx::float16);
    a.options.stochastic_rounding = true;
  });
  array x(1.0f);
  try {
    adadelta_update({x}, {}, {x}, {x}, x);
  } catch (const std::invalid_argument&) {
    return;
  }
  require(false, "not refused: length");
}

// ------------------------------- Transforms ---------------------------------

using Arrays = std::vector<array>;

Arrays fused(const Arrays& x) {
  auto new_ = adadelta_update({x[0]}, {x[1]}, {x[2]}, {x[3]}, x[4]);
  return {new_.parameters[0], new_.v[0], new_.u[0]};
}

Arrays plain(const Arrays& x) {
  array rho(0.9f), rest(static_cast<float>(1 - 0.9)), eps(1e-6f);
  auto v = rho * x[2] + rest * mx::square(x[1]);
  auto d = mx::sqrt(x[3] + eps) / mx::sqrt(v + eps) * x[1];
  auto u = rho * x[3] + rest * mx::square(d);
  return {x[0] - x[4] * d, v, u};
}

void require_close(const Arrays& xs, const Arrays& ys, const char* name) {
  require(xs.size() == ys.size(), name, ": number");
  for (size_t i = 0; i < xs.size(); ++i) {
    require(
        mx::allclose(xs[i], ys[i], 1e-5, 1e-6).item<bool>(),
        name,
        ": array ",
        i,
        " differs");
  }
}

void test_transforms() {
  auto t = make_tensors({4, 5, 6}, kFloat32, {.g = "transposed"});
  Arrays primals{t.w, t.g, t.v, t.u, array(0.75f)};
  Arrays tangents{t.u, t.w, t.g, t.v, array(0.5f)};
  Arrays cotangents{t.g, t.u, t.w};
  require_close(
      mx::jvp(fused, primals, tangents).second,
      mx::jvp(plain, primals, tangents).second,
      "jvp");
  require_close(
      mx::vjp(fused, primals, cotangents).second,
      mx::vjp(plain, primals, cotangents).second,
      "vjp");
  std::vector<int> axes{0, 0, 0, 0, -1};
  require_close(
      mx::vmap(fused, axes)(primals), mx::vmap(plain, axes)(primals), "vmap");
  auto compiled = mx::compile(fused);
  for (int i = 0; i < 2; ++i) {
    require_close(compiled(primals), fused(primals), "compile");
  }
}

// Quick ones first.
const std::vector<std::pair<const char*, void (*)()>> kTests{
    {"types", test_types},
    {"groups", test_groups},
    {"memory is reused", test_memory_is_reused},
    {"one array in many places", test_one_array_in_many_places},
    {"options", test_options},
    {"refusals", test_refusals},
    {"transforms", test_transforms},
    {"a throw within an evaluation", test_a_throw_within_an_evaluation},
    {"steps follow one another", test_steps_follow_one_another},
    {"stochastic rounding", test_stochastic_rounding},
    {"shapes and layouts", test_shapes_and_layouts},
    {"large halves", test_large_halves},
    {"streams of two threads", test_streams_of_two_threads}};

} // namespace

int main() {
  for (const auto& [name, test] : kTests) {
    try {
      test();
    } catch (const std::exception& error) {
      std::printf("FAILED: %s: %s\n", name, error.what());
      return 1;
    }
    std::printf("passed: %s\n", name);
    std::fflush(stdout);
  }
  return 0;
}
