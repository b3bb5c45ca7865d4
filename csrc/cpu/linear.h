// The update of elements that lie side by side.

#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "convert.h"

namespace mlx_adadelta {

namespace {

// Elements that are converted and updated at a time: their float32 values stay
// in the L1 cache.
constexpr size_t kBlock = 512;

// What all elements of a parameter share.
struct Scalars {
  float lr;
  float gradient_scale;
  bool skip;
  AdaDeltaParams params;
  RandomKeys keys;
};

// Elements of a parameter and its companions.
struct Elements {
  Type w_type;
  Type g_type;
  Type state_type;
  const std::byte* w;
  const std::byte* g;
  const std::byte* v;
  const std::byte* u;
  std::byte* w_out;
  std::byte* v_out;
  std::byte* u_out;

  Elements at(size_t i) const {
    size_t in_w = i * size_of(w_type);
    size_t in_state = i * size_of(state_type);
    Elements x = *this;
    x.w += in_w;
    x.g += i * size_of(g_type);
    x.v += in_state;
    x.u += in_state;
    x.w_out += in_w;
    x.v_out += in_state;
    x.u_out += in_state;
    return x;
  }
};

ADADELTA_CLONES void step_each(
    const float* w,
    const float* g,
    const float* v,
    const float* u,
    float* w_out,
    float* v_out,
    float* u_out,
    size_t n,
    float lr,
    float gradient_scale,
    AdaDeltaParams params) {
  ADADELTA_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    auto next =
        adadelta_step(w[i], g[i], v[i], u[i], lr, gradient_scale, params);
    w_out[i] = next.w;
    v_out[i] = next.v;
    u_out[i] = next.u;
  }
}

// x: the first of at most kBlock elements, whose place in memory is `place`.
inline void update_block(
    const Elements& x,
    size_t n,
    uint64_t place,
    const Scalars& scalars) {
  alignas(64) float w[kBlock];
  alignas(64) float g[kBlock];
  alignas(64) float v[kBlock];
  alignas(64) float u[kBlock];
  alignas(64) uint32_t hashes[kBlock];
  auto out = [](Type type, std::byte* y, float* buffer) {
    return type == Type::float32 ? reinterpret_cast<float*>(y) : buffer;
  };
  step_each(
      widen(x.w_type, x.w, n, w),
      widen(x.g_type, x.g, n, g),
      widen(x.state_type, x.v, n, v),
      widen(x.state_type, x.u, n, u),
      out(x.w_type, x.w_out, w),
      out(x.state_type, x.v_out, v),
      out(x.state_type, x.u_out, u),
      n,
      scalars.lr,
      scalars.gradient_scale,
      scalars.params);
  const auto& keys = scalars.keys;
  bool stochastic = scalars.params.stochastic != 0;
  if (stochastic) {
    auto low = static_cast<uint32_t>(place);
    hash_each(hashes, n, keys.place, low, static_cast<uint32_t>(place >> 32));
  }
  const auto* random = stochastic ? hashes : nullptr;
  narrow(x.w_type, w, x.w_out, n, random, keys.w, kFactorW);
  narrow(x.state_type, v, x.v_out, n, random, keys.v, kFactorV);
  narrow(x.state_type, u, x.u_out, n, random, keys.u, kFactorU);
}

// x: the first of n elements, whose place in memory is `place`.
inline void
update(Elements x, size_t n, uint64_t place, const Scalars& scalars) {
  if (scalars.skip) {
    std::memmove(x.w_out, x.w, n * size_of(x.w_type));
    std::memmove(x.v_out, x.v, n * size_of(x.state_type));
    std::memmove(x.u_out, x.u, n * size_of(x.state_type));
    return;
  }
  while (n > 0) {
    // A block's places have one high word.
    uint64_t same = (uint64_t{1} << 32) - static_cast<uint32_t>(place);
    size_t block = std::min<uint64_t>({n, kBlock, same});
    update_block(x, block, place, scalars);
    x = x.at(block);
    n -= block;
    place += block;
  }
}

} // namespace

} // namespace mlx_adadelta
