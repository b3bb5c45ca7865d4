// The Metal source as shipped, embedded by CMakeLists.txt.

#pragma once

namespace mlx_adadelta {

/** adadelta.metal with its headers in place of their #include. ASCII. */
extern const char* const metal_source;

/** Names the library in MLX's cache, which is keyed by nothing else: holds a
 * hash of the source. */
extern const char* const metal_library_name;

} // namespace mlx_adadelta
