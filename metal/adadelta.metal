// The entry points: update.h's kernels, once for each combination of types.

#include "update.h"

using namespace mlx_adadelta;

// As MLX names them; Apple's headers have taken float16 and bfloat16.
typedef float float32_t;
typedef half float16_t;
typedef bfloat bfloat16_t;

// clang-format off
#define ADADELTA_BUFFERS(W, G, S)                                     \
  const device W##_t* w [[buffer(0)]],                                \
  const device G##_t* g [[buffer(1)]],                                \
  const device S##_t* v [[buffer(2)]],                                \
  const device S##_t* u [[buffer(3)]],                                \
  device W##_t* w_out [[buffer(4)]],                                  \
  device S##_t* v_out [[buffer(5)]],                                  \
  device S##_t* u_out [[buffer(6)]],                                  \
  const device float* lr [[buffer(7)]],                               \
  const device float* gradient_scale [[buffer(8)]],                   \
  const device bool* skip [[buffer(9)]],                              \
  const device uint64_t* step [[buffer(10)]],                         \
  constant AdaDeltaParams& params [[buffer(11)]]

#define ADADELTA_GIVEN(W, G, S)                                       \
  const Arguments<W##_t, G##_t, S##_t> given = {                      \
      w, g, v, u, w_out, v_out, u_out,                                \
      lr[0], gradient_scale[0], skip[0], step[0], &params};

#define ADADELTA_KERNELS(W, G, S)                                     \
  [[kernel]] void adadelta_linear_##W##_##G##_##S(                    \
      ADADELTA_BUFFERS(W, G, S),                                      \
      constant uint64_t& n [[buffer(12)]],                            \
      uint group [[threadgroup_position_in_grid]],                    \
      uint lane [[thread_position_in_threadgroup]],                   \
      uint lanes [[threads_per_threadgroup]]) {                       \
    ADADELTA_GIVEN(W, G, S)                                           \
    update_linear<W##_t, G##_t, S##_t>(given, n, group, lane, lanes); \
  }                                                                   \
  [[kernel]] void adadelta_tiled_##W##_##G##_##S(                     \
      ADADELTA_BUFFERS(W, G, S),                                      \
      constant AdaDeltaTile& tile [[buffer(12)]],                     \
      threadgroup G##_t* staged [[threadgroup(0)]],                   \
      uint3 group [[threadgroup_position_in_grid]],                   \
      uint3 lane [[thread_position_in_threadgroup]]) {                \
    ADADELTA_GIVEN(W, G, S)                                           \
    update_tiled<W##_t, G##_t, S##_t>(                                \
        given,                                                        \
        {tile.batch_stride, tile.column_stride, tile.rows, tile.columns}, \
        staged,                                                       \
        group,                                                        \
        lane.x);                                                      \
  }
// clang-format on

ADADELTA_FOR_EACH_TYPES(ADADELTA_KERNELS)
