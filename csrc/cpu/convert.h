// Loops over a block of elements: 16 bits to float32 and back. Whole loops, for
// GCC vectorizes each of them but not one that converts, computes and rounds.

#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "adadelta_step.h"
#include "mlx/types/half_types.h"

// Where the compiler can, it compiles each loop for several vector widths, and
// the loader chooses. A build may define ADADELTA_CLONES to measure one of
// them, or as nothing for sanitizers, which start too late for the choice.
#ifdef ADADELTA_CLONES
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#include <immintrin.h>
#define ADADELTA_F16C
#define ADADELTA_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ADADELTA_CLONES
#endif

// What a cloned loop calls must be part of it.
#define ADADELTA_INLINE inline __attribute__((always_inline))

// An output may be its own input, element for element: tell the compiler that
// this is safe to vectorize.
#if defined(__clang__)
#define ADADELTA_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ADADELTA_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace mlx_adadelta {

namespace {

// ------------------------------- One element --------------------------------

// MLX's own conversions branch on x86, which keeps a loop scalar. These give
// the same results without.
ADADELTA_INLINE float widen_float16(uint16_t x) {
#ifdef __ARM_FEATURE_FP16_SCALAR_ARITHMETIC
  return std::bit_cast<mlx::core::float16_t>(x);
#else
  uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  uint32_t sign = uint32_t(x & 0x8000) << 16;
  float normal = float_of(magnitude + (0xe0u << 23)) * 0x1p-112f;
  float subnormal = float_of((magnitude >> 13) | (126u << 23)) - 0.5f;
  bool is_normal = magnitude >= (1u << 23);
  return float_of(sign | (is_normal ? bits_of(normal) : bits_of(subnormal)));
#endif
}

ADADELTA_INLINE float widen_bfloat16(uint16_t x) {
  return float_of(uint32_t(x) << 16);
}

ADADELTA_INLINE uint32_t narrow_float16(float x) {
#ifdef __ARM_FEATURE_FP16_SCALAR_ARITHMETIC
  return std::bit_cast<uint16_t>(static_cast<mlx::core::float16_t>(x));
#else
  uint32_t magnitude = bits_of(x) & 0x7fffffff;
  uint32_t sign = (bits_of(x) >> 16) & 0x8000;
  // Adding a power of two rounds where half's last bit is. Too large a value
  // becomes infinite on the way.
  uint32_t power = std::max(magnitude & 0x7f800000, 0x38800000u) + (15u << 23);
  float scaled = float_of(magnitude) * 0x1p112f * 0x1p-110f;
  uint32_t sum = bits_of(float_of(power) + scaled);
  uint32_t rounded = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  return sign | (magnitude > 0x7f800000 ? 0x7d00 : rounded);
#endif
}

ADADELTA_INLINE uint32_t narrow_bfloat16(float x) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + ((bits >> 16) & 1) + 0x7fff) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

// ---------------------------------- Loops -----------------------------------

#ifdef ADADELTA_F16C
// A processor's own conversions of float16: 8 at a time, and how many that
// were. Functions of their own, for not every clone may use F16C.
__attribute__((target("avx,f16c"))) size_t
widen_f16c(const uint16_t* x, float* y, size_t n) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(half));
  }
  return i;
}

__attribute__((target("avx,f16c"))) size_t
narrow_f16c(const float* x, uint16_t* y, size_t n) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    auto half =
        _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), half);
  }
  return i;
}

bool has_f16c() {
  return __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
}
#else
size_t widen_f16c(const uint16_t*, float*, size_t) {
  return 0;
}

size_t narrow_f16c(const float*, uint16_t*, size_t) {
  return 0;
}

bool has_f16c() {
  return false;
}
#endif

template <float (*widen)(uint16_t)>
ADADELTA_CLONES void widen_each(const uint16_t* x, float* y, size_t n) {
  ADADELTA_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    y[i] = widen(x[i]);
  }
}

template <uint32_t (*narrow)(float)>
ADADELTA_CLONES void narrow_each(const float* x, uint16_t* y, size_t n) {
  ADADELTA_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    y[i] = narrow(x[i]);
  }
}

// Rounds stochastically. An element's random bits are key + hash * factor.
template <uint32_t (*round)(float, uint32_t)>
ADADELTA_CLONES void round_each(
    const float* x,
    uint16_t* y,
    size_t n,
    const uint32_t* hashes,
    uint32_t key,
    uint32_t factor) {
  ADADELTA_INDEPENDENT
  for (size_t i = 0; i < n; ++i) {
    y[i] = round(x[i], key + hashes[i] * factor);
  }
}

// Of the places whose low words start at `low` and whose high word is `high`.
ADADELTA_CLONES void hash_each(
    uint32_t* hashes,
    size_t n,
    uint32_t key,
    uint32_t low,
    uint32_t high) {
  for (size_t i = 0; i < n; ++i) {
    hashes[i] = hash_place(key, low + static_cast<uint32_t>(i), high);
  }
}

// ---------------------------------- Types -----------------------------------

enum class Type : uint8_t { float32, float16, bfloat16 };

inline size_t size_of(Type type) {
  return type == Type::float32 ? sizeof(float) : sizeof(uint16_t);
}

// x as float32: in the buffer, or where it lies.
inline const float* widen(Type type, const void* x, size_t n, float* buffer) {
  auto* half = static_cast<const uint16_t*>(x);
  if (type == Type::float32) {
    return static_cast<const float*>(x);
  }
  if (type == Type::bfloat16) {
    widen_each<widen_bfloat16>(half, buffer, n);
  } else {
    size_t done = has_f16c() ? widen_f16c(half, buffer, n) : 0;
    widen_each<widen_float16>(half + done, buffer + done, n - done);
  }
  return buffer;
}

// Rounds x, unless it is float32, to the nearest, or by the hashes if there
// are.
inline void narrow(
    Type type,
    const float* x,
    void* y,
    size_t n,
    const uint32_t* hashes,
    uint32_t key,
    uint32_t factor) {
  auto* half = static_cast<uint16_t*>(y);
  if (type == Type::bfloat16 && hashes != nullptr) {
    round_each<round_to_bfloat16>(x, half, n, hashes, key, factor);
  } else if (type == Type::bfloat16) {
    narrow_each<narrow_bfloat16>(x, half, n);
  } else if (type == Type::float16 && hashes != nullptr) {
    round_each<round_to_float16>(x, half, n, hashes, key, factor);
  } else if (type == Type::float16) {
    size_t done = has_f16c() ? narrow_f16c(x, half, n) : 0;
    narrow_each<narrow_float16>(x + done, half + done, n - done);
  }
}

} // namespace

} // namespace mlx_adadelta
