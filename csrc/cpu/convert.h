// Blocks of elements from 16 bits to float32 and back. A loop each: GCC
// vectorizes these, but not a loop that converts, computes and rounds.

#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "adadelta_step.h"
#include "mlx/dtype.h"
#include "mlx/types/half_types.h"

// Where the compiler can, it compiles each loop for several vector widths, and
// the loader chooses. A build may define ADADELTA_CLONES to measure one of
// them, or as nothing for sanitizers, which start too late for the choice.
#ifdef ADADELTA_CLONES
#elif defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define ADADELTA_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ADADELTA_CLONES
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define ADADELTA_F16C
#include <immintrin.h>
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

namespace mx = mlx::core;

namespace {

// Elements that are converted and updated at a time. Few, so that a core works
// on one block's conversions while it still divides for the block before.
constexpr size_t kBlock = 128;

constexpr size_t kCacheLine = 64; // bytes

// Asks for a block's memory, which may lie beyond the array. The hardware's own
// prefetching ends with each page of 4 kB and has to find out about the next.
ADADELTA_INLINE void prefetch(mx::Dtype type, const std::byte* block) {
  for (size_t i = 0; i < kBlock * type.size(); i += kCacheLine) {
    __builtin_prefetch(block + i);
  }
}

#ifdef ADADELTA_F16C
// The processor's own conversions of float16, where MLX's are software.
// Functions of their own, because not every clone may use F16C.
__attribute__((target("avx,f16c"))) void widen_f16c(
    const uint16_t* x,
    float* y) {
  for (size_t i = 0; i < kBlock; i += 8) {
    auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(half));
  }
}

__attribute__((target("avx,f16c"))) void narrow_f16c(
    const float* x,
    uint16_t* y) {
  for (size_t i = 0; i < kBlock; i += 8) {
    auto half =
        _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), half);
  }
}

bool has_f16c() {
  return __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
}
#endif

// A block as float32: in the buffer, or where it lies.
ADADELTA_INLINE const float*
widen(mx::Dtype type, const std::byte* x, float* buffer) {
  auto* half = reinterpret_cast<const uint16_t*>(x);
  if (type == mx::float32) {
    return reinterpret_cast<const float*>(x);
  }
  if (type == mx::bfloat16) {
    ADADELTA_INDEPENDENT
    for (size_t i = 0; i < kBlock; ++i) {
      buffer[i] = float_of(uint32_t(half[i]) << 16);
    }
    return buffer;
  }
#ifdef ADADELTA_F16C
  if (has_f16c()) {
    widen_f16c(half, buffer);
    return buffer;
  }
#endif
  ADADELTA_INDEPENDENT
  for (size_t i = 0; i < kBlock; ++i) {
    buffer[i] = std::bit_cast<mx::float16_t>(half[i]);
  }
  return buffer;
}

// Rounds a block to the nearest; leaves float32 alone.
ADADELTA_INLINE void narrow(mx::Dtype type, const float* x, std::byte* y) {
  auto* half = reinterpret_cast<uint16_t*>(y);
  if (type == mx::bfloat16) {
    // MLX's own conversion branches on x86, which keeps a loop scalar.
    ADADELTA_INDEPENDENT
    for (size_t i = 0; i < kBlock; ++i) {
      uint32_t odd = bits_of(x[i]) >> 16 & 1;
      half[i] = round_to_bfloat16(x[i], (0x7fff + odd) << 16);
    }
  } else if (type == mx::float16) {
#ifdef ADADELTA_F16C
    if (has_f16c()) {
      narrow_f16c(x, half);
      return;
    }
#endif
    ADADELTA_INDEPENDENT
    for (size_t i = 0; i < kBlock; ++i) {
      half[i] = std::bit_cast<uint16_t>(static_cast<mx::float16_t>(x[i]));
    }
  }
}

// The same stochastically: an element's random bits are key + hash * factor.
ADADELTA_INLINE void narrow(
    mx::Dtype type,
    const float* x,
    std::byte* y,
    const uint32_t* hashes,
    uint32_t key,
    uint32_t factor) {
  auto* half = reinterpret_cast<uint16_t*>(y);
  if (type == mx::bfloat16) {
    ADADELTA_INDEPENDENT
    for (size_t i = 0; i < kBlock; ++i) {
      half[i] = round_to_bfloat16(x[i], key + hashes[i] * factor);
    }
  } else if (type == mx::float16) {
    ADADELTA_INDEPENDENT
    for (size_t i = 0; i < kBlock; ++i) {
      half[i] = round_to_float16(x[i], key + hashes[i] * factor);
    }
  }
}

} // namespace

} // namespace mlx_adadelta
