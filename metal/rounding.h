// Stochastic rounding of float32 to 16 bits with counter-based random bits.
// Integers only, so that every backend gets the same result.

#ifndef MLX_ADADELTA_ROUNDING_H_
#define MLX_ADADELTA_ROUNDING_H_

namespace mlx_adadelta {

struct RandomWords {
  unsigned int x[4];
};

// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", SC11.
inline RandomWords philox(
    unsigned int c0,
    unsigned int c1,
    unsigned int c2,
    unsigned int c3,
    unsigned int key_0,
    unsigned int key_1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0;
    const uint64_t b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<unsigned int>(b >> 32) ^ c1 ^ key_0;
    c1 = static_cast<unsigned int>(b);
    c2 = static_cast<unsigned int>(a >> 32) ^ c3 ^ key_1;
    c3 = static_cast<unsigned int>(a);
    key_0 += 0x9E3779B9u;
    key_1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The bits of a float32 to those of a bfloat16: up with the probability of
// the fraction that is cut off. Infinity and NaN are left to be themselves.
inline unsigned int round_to_bfloat16(unsigned int x, unsigned int random) {
  unsigned int magnitude = x & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    return 0x7FC0u;
  }
  return (x + (random >> 16)) >> 16;
}

// The same to float16, subnormal numbers included.
inline unsigned int round_to_float16(unsigned int x, unsigned int random) {
  unsigned int sign = (x >> 16) & 0x8000u;
  unsigned int magnitude = x & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    return sign | 0x7E00u;
  }
  if (magnitude >= 0x38800000u) { // 2^-14: normal in float16
    unsigned int rounded = (magnitude + (random >> 19) - 0x38000000u) >> 13;
    return sign | (rounded < 0x7C00u ? rounded : 0x7C00u);
  }
  // In units of 2^-24, the spacing of float16's subnormal numbers.
  unsigned int exponent = magnitude >> 23;
  unsigned int significand =
      (magnitude & 0x7FFFFFu) | (exponent > 0 ? 0x800000u : 0u);
  unsigned int shift = 126u - (exponent > 0 ? exponent : 1u); // at least 14
  if (shift < 32u) {
    return sign | ((significand + (random >> (32u - shift))) >> shift);
  }
  unsigned int odds = shift < 64u ? significand >> (shift - 32u) : 0u;
  return sign | (random < odds ? 1u : 0u);
}

} // namespace mlx_adadelta

#endif // MLX_ADADELTA_ROUNDING_H_
