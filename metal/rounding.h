// Stochastic rounding of float32 to 16 bits, and the random bits for it. Every
// operation is exact, so that every backend gets the same result.

#ifndef MLX_ADADELTA_ROUNDING_H_
#define MLX_ADADELTA_ROUNDING_H_

namespace mlx_adadelta {

inline uint32_t bits_of(float x) {
#ifdef __METAL_VERSION__
  return as_type<uint>(x);
#else
  return std::bit_cast<uint32_t>(x);
#endif
}

inline float float_of(uint32_t bits) {
#ifdef __METAL_VERSION__
  return as_type<float>(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

// What the random bits of a tensor at a step are made from.
struct RandomKeys {
  uint32_t w;
  uint32_t v;
  uint32_t u;
  uint32_t place;
};

// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", SC11.
inline RandomKeys philox(
    uint32_t c0,
    uint32_t c1,
    uint32_t c2,
    uint32_t c3,
    uint32_t key_0,
    uint32_t key_1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0;
    const uint64_t b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key_0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key_1;
    c3 = static_cast<uint32_t>(a);
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// An element's bits are its key plus a factor times the hash of its place in
// memory. The keys alone make the bits uniform and independent over the steps.
// The factors keep w, v and u apart within a step: 2^32 over x, x^2 and x^3
// where x^4 = x + 1, made odd (Roberts, "The unreasonable effectiveness of
// quasirandom sequences", 2018).
constexpr ADADELTA_CONSTANT uint32_t kFactorW = 0xD1B54A33u;
constexpr ADADELTA_CONSTANT uint32_t kFactorV = 0xABC98389u;
constexpr ADADELTA_CONSTANT uint32_t kFactorU = 0x8CB92BA7u;

// The key for places whose high word is greater by `high`. The factor is
// MurmurHash3's first constant.
inline uint32_t add_high(uint32_t key, uint32_t high) {
  return key + high * 0x85EBCA6Bu;
}

// Makes neighbours look independent: multiplicative hashing (Knuth, TAOCP 6.4,
// 2^32 over the golden ratio). The place comes in two words.
inline uint32_t hash_place(uint32_t key, uint32_t low, uint32_t high) {
  uint32_t hash = (low ^ add_high(key, high)) * 0x9E3779B9u;
  return hash ^ hash >> 15;
}

// A float32 to the bits of a bfloat16: up with the probability of the fraction
// that is cut off. Infinity and NaN stay themselves.
inline uint32_t round_to_bfloat16(float x, uint32_t random) {
  const uint32_t rounded = (bits_of(x) + (random >> 16)) >> 16;
  return (bits_of(x) & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded;
}

// The same to float16. Both ranges are computed and added: a branch would keep
// a loop scalar.
inline uint32_t round_to_float16(float x, uint32_t random) {
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  const uint32_t limit = 0x38800000u; // 2^-14: below it, subnormal
  const uint32_t low = magnitude < limit ? magnitude : limit;
  // In units of 2^-24, the spacing of float16's subnormal numbers. The odds of
  // rounding up are cut off at 2^-31.
  const float units = float_of(low) * 16777216.0f;
  const int whole = static_cast<int>(units);
  const int odds =
      static_cast<int>((units - static_cast<float>(whole)) * 2147483648.0f);
  const int up = static_cast<int>(random >> 1) < odds ? 1 : 0;
  const uint32_t above = (magnitude - low + (random >> 19)) >> 13;
  uint32_t rounded = static_cast<uint32_t>(whole + up) + above;
  rounded = rounded < 0x7C00u ? rounded : 0x7C00u;
  const uint32_t quiet = magnitude > 0x7F800000u ? 0x0200u : 0u; // for a NaN
  return ((bits_of(x) >> 16) & 0x8000u) | rounded | quiet;
}

} // namespace mlx_adadelta

#endif // MLX_ADADELTA_ROUNDING_H_
