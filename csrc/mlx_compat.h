// What differs between the releases of MLX that this source builds with.

#pragma once

#include <memory>
#include <utility>

#include "mlx/array.h"
#include "mlx/version.h"
#ifdef MLX_ADADELTA_METAL // defined by eval_metal.cpp
#include "mlx/backend/metal/device.h"
#endif

namespace mlx_adadelta {

namespace mx = mlx::core;

// Whether an eval that throws has finished what it began. Before, an array may
// look as if it was computed when it is not.
constexpr bool kFinishesEvals = MLX_VERSION_NUMERIC >= 32001;

// New memory, freed unless an array takes it.
#if MLX_VERSION_NUMERIC >= 32004
using Memory = mx::allocator::Data;
#else
struct Memory {
  struct Free {
    void operator()(void* buffer) const {
      mx::allocator::free(mx::allocator::Buffer(buffer));
    }
  };
  Memory(mx::allocator::Buffer buffer) : buffer(buffer.ptr()) {}
  operator mx::allocator::Buffer() && {
    return mx::allocator::Buffer(buffer.release());
  }
  std::unique_ptr<void, Free> buffer;
};
#endif

#ifdef MLX_ADADELTA_METAL
inline auto& metal_encoder(mx::metal::Device& device, mx::Stream stream) {
#if MLX_VERSION_NUMERIC >= 31001
  return mx::metal::get_command_encoder(stream);
#else
  return device.get_command_encoder(stream.index);
#endif
}

// Keeps an array until the GPU is done with it.
inline void
keep_temporary(mx::metal::Device& device, mx::Stream stream, mx::array x) {
#if MLX_VERSION_NUMERIC >= 31001
  mx::metal::get_command_encoder(stream).add_temporary(std::move(x));
#else
  device.add_temporary(std::move(x), stream.index);
#endif
}
#endif

} // namespace mlx_adadelta
