// The update of elements that lie side by side.

#pragma once

#include <algorithm>
#include <cstring>

#include "convert.h"

namespace mlx_adadelta {

namespace {

// How far ahead of a block to ask for each of its streams.
constexpr size_t kAheadBytes = 2048;

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
  mx::Dtype w_type;
  mx::Dtype g_type;
  mx::Dtype state_type;
  const std::byte* w;
  const std::byte* g;
  const std::byte* v;
  const std::byte* u;
  std::byte* w_out;
  std::byte* v_out;
  std::byte* u_out;

  ADADELTA_INLINE Elements at(size_t i) const {
    size_t in_w = i * w_type.size();
    size_t in_state = i * state_type.size();
    Elements x = *this;
    x.w += in_w;
    x.g += i * g_type.size();
    x.v += in_state;
    x.u += in_state;
    x.w_out += in_w;
    x.v_out += in_state;
    x.u_out += in_state;
    return x;
  }
};

// x: the first of kBlock elements, whose place in memory is `place`. Their
// places have one high word.
ADADELTA_INLINE void
update_block(const Elements& x, uint64_t place, const Scalars& scalars) {
  prefetch(x.w_type, x.w + kAheadBytes);
  prefetch(x.g_type, x.g + kAheadBytes);
  prefetch(x.state_type, x.v + kAheadBytes);
  prefetch(x.state_type, x.u + kAheadBytes);
  alignas(64) float buffers[4][kBlock];
  const auto* w = widen(x.w_type, x.w, buffers[0]);
  const auto* g = widen(x.g_type, x.g, buffers[1]);
  const auto* v = widen(x.state_type, x.v, buffers[2]);
  const auto* u = widen(x.state_type, x.u, buffers[3]);
  auto out = [](mx::Dtype type, std::byte* y, float* buffer) {
    return type == mx::float32 ? reinterpret_cast<float*>(y) : buffer;
  };
  auto* new_w = out(x.w_type, x.w_out, buffers[0]);
  auto* new_v = out(x.state_type, x.v_out, buffers[2]);
  auto* new_u = out(x.state_type, x.u_out, buffers[3]);
  const auto params = scalars.params;
  const float lr = scalars.lr;
  const float scale = scalars.gradient_scale;
  ADADELTA_INDEPENDENT
  for (size_t i = 0; i < kBlock; ++i) {
    auto next = adadelta_step(w[i], g[i], v[i], u[i], lr, scale, params);
    new_w[i] = next.w;
    new_v[i] = next.v;
    new_u[i] = next.u;
  }
  if (params.stochastic == 0) {
    narrow(x.w_type, new_w, x.w_out);
    narrow(x.state_type, new_v, x.v_out);
    narrow(x.state_type, new_u, x.u_out);
    return;
  }
  alignas(64) uint32_t hashes[kBlock];
  const auto& keys = scalars.keys;
  auto low = static_cast<uint32_t>(place);
  auto high = static_cast<uint32_t>(place >> 32);
  for (uint32_t i = 0; i < kBlock; ++i) {
    hashes[i] = hash_place(keys.place, low + i, high);
  }
  narrow(x.w_type, new_w, x.w_out, hashes, keys.w, kFactorW);
  narrow(x.state_type, new_v, x.v_out, hashes, keys.v, kFactorV);
  narrow(x.state_type, new_u, x.u_out, hashes, keys.u, kFactorU);
}

// x: the first of n elements, whose place in memory is `place`. All but the
// last few; returns how many.
ADADELTA_CLONES size_t update_blocks(
    const Elements& x,
    size_t n,
    uint64_t place,
    const Scalars& scalars) {
  size_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    update_block(x.at(i), place + i, scalars);
  }
  return i;
}

// Fewer elements than a block: in a block of their own.
inline void update_few(
    const Elements& x,
    size_t n,
    uint64_t place,
    const Scalars& scalars) {
  alignas(64) std::byte block[4][kBlock * sizeof(float)]{};
  auto y = x;
  y.w = y.w_out = block[0];
  y.g = block[1];
  y.v = y.v_out = block[2];
  y.u = y.u_out = block[3];
  size_t w_bytes = n * x.w_type.size();
  size_t state_bytes = n * x.state_type.size();
  std::memcpy(block[0], x.w, w_bytes);
  std::memcpy(block[1], x.g, n * x.g_type.size());
  std::memcpy(block[2], x.v, state_bytes);
  std::memcpy(block[3], x.u, state_bytes);
  update_blocks(y, kBlock, place, scalars);
  std::memcpy(x.w_out, block[0], w_bytes);
  std::memcpy(x.v_out, block[2], state_bytes);
  std::memcpy(x.u_out, block[3], state_bytes);
}

// x: the first of n elements, whose place in memory is `place`.
inline void
update(const Elements& x, size_t n, uint64_t place, const Scalars& scalars) {
  if (scalars.skip) {
    std::memmove(x.w_out, x.w, n * x.w_type.size());
    std::memmove(x.v_out, x.v, n * x.state_type.size());
    std::memmove(x.u_out, x.u, n * x.state_type.size());
    return;
  }
  // Up to where the place's high word changes, and from there.
  uint64_t same = (uint64_t{1} << 32) - static_cast<uint32_t>(place);
  if (n > same) {
    update(x, same, place, scalars);
    update(x.at(same), n - same, place + same, scalars);
    return;
  }
  size_t done = update_blocks(x, n, place, scalars);
  if (done < n) {
    update_few(x.at(done), n - done, place + done, scalars);
  }
}

} // namespace

} // namespace mlx_adadelta
