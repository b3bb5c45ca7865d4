#define MLX_ADADELTA_METAL // mlx_compat.h

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "adadelta.h"
#include "layout.h"
#include "metal_source.h"
#include "mlx_compat.h"
#include "norm.h"

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

// mlx_adadelta.metallib beside this very library or in the folder above, where
// the extensions of a wheel share it; empty if there is none.
std::string find_metallib() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&find_metallib), &info) == 0) {
    return "";
  }
  auto folder = std::filesystem::path(info.dli_fname).parent_path();
  for (const auto& place : {folder, folder.parent_path()}) {
    auto path = place / "mlx_adadelta.metallib";
    if (std::filesystem::exists(path)) {
      return path.string();
    }
  }
  return "";
}

MTL::Library* library(metal::Device& device) {
  static const std::string metallib = find_metallib();
  if (!metallib.empty()) {
    return device.get_library(metal_library_name, metallib);
  }
  return device.get_library(
      metal_library_name, [] { return std::string(metal_source); });
}

size_t blocks(size_t n, size_t block) {
  return (n + block - 1) / block;
}

struct Dispatch {
  MTL::ComputePipelineState* kernel;
  size_t size;
  MTL::Size grid;
  MTL::Size threads;
  size_t threadgroup_bytes;
};

Dispatch plan_linear(
    MTL::ComputePipelineState* kernel,
    size_t n,
    size_t elements, // a thread, like the bytes
    size_t threadgroup_bytes) {
  size_t threads =
      std::min<size_t>(kThreads, kernel->maxTotalThreadsPerThreadgroup());
  return {
      kernel,
      n,
      MTL::Size(blocks(n, threads * elements), 1, 1),
      MTL::Size(threads, 1, 1),
      threadgroup_bytes * threads};
}

Dispatch plan_dispatch(metal::Device& device, const Operands& x) {
  int types =
      find_types(x.w.source.dtype(), x.g.source.dtype(), x.v.source.dtype());
  bool tiled = x.transposed();
  auto* kernel = device.get_kernel(
      std::string(tiled ? "adadelta_tiled_" : "adadelta_linear_") +
          types_name(types),
      library(device));
  size_t n = x.g.source.size();
  if (!tiled) {
    return plan_linear(kernel, n, kElementsPerThread, 0);
  }
  if (kernel->maxTotalThreadsPerThreadgroup() < kTileThreads) {
    throw std::runtime_error(
        "[AdaDeltaUpdate::eval_gpu] This GPU runs too few threads in a "
        "threadgroup for the tiled kernel.");
  }
  const auto& tile = x.tile;
  size_t beside_g = x.g.source.itemsize();
  size_t rows = tile_side(beside_g, beside_g);
  size_t columns = tile_side(x.w.source.itemsize(), x.v.source.itemsize());
  return {
      kernel,
      n,
      MTL::Size(
          blocks(tile.columns, columns),
          blocks(tile.rows, rows),
          n / (static_cast<size_t>(tile.rows) * tile.columns)),
      MTL::Size(kTileThreads, 1, 1),
      columns * kTileStride};
}

// A kernel of norm.metal over n elements.
Dispatch plan_norm(metal::Device& device, const char* name, size_t n) {
  auto* kernel = device.get_kernel(name, library(device));
  return plan_linear(kernel, n, kNormElements, 2 * sizeof(float));
}

} // namespace

void AdaDeltaUpdate::eval_gpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  if (is_done(outputs)) {
    return;
  }
  auto& device = metal::device(stream().device);
  auto& encoder = metal_encoder(device, stream());
  Evaluation evaluation(inputs, outputs);
  std::vector<Dispatch> dispatches;
  for (const auto& x : evaluation.operands()) {
    dispatches.push_back(plan_dispatch(device, x));
  }
  evaluation.prepare(stream(), [&](array copy) {
    keep_temporary(device, stream(), std::move(copy));
  });

  for (size_t i = 0; i < dispatches.size(); ++i) {
    const auto& x = evaluation.operands()[i];
    const auto& dispatch = dispatches[i];
    if (dispatch.size == 0) {
      continue;
    }
    encoder.set_compute_pipeline_state(dispatch.kernel);
    int index = 0;
    for (const auto* in : {&x.w, &x.g, &x.v, &x.u}) {
      encoder.set_input_array(in->source, index++);
    }
    for (size_t j = 3 * i; j < 3 * i + 3; ++j) {
      encoder.set_output_array(outputs[j], index++);
    }
    for (size_t j = 0; j < kScalars; ++j) {
      encoder.set_input_array(scalar(inputs, j), index++);
    }
    encoder.set_bytes(params_[i], 11);
    if (x.transposed()) {
      encoder.set_bytes(x.tile, 12);
      encoder.set_threadgroup_memory_length(dispatch.threadgroup_bytes, 0);
    } else {
      encoder.set_bytes(static_cast<uint64_t>(dispatch.size), 12);
    }
    encoder.dispatch_threadgroups(dispatch.grid, dispatch.threads);
  }
  evaluation.finish();
}

void GradientNorm::eval_gpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  auto& device = metal::device(stream().device);
  auto& encoder = metal_encoder(device, stream());
  auto keep = [&](array x) { keep_temporary(device, stream(), std::move(x)); };
  auto total = plan_norm(device, "norm_total", 1);
  std::vector<std::pair<array, Dispatch>> gradients;
  size_t groups = 0;
  for (const auto& x : inputs) {
    if (x.size() != 0) {
      auto name = x.dtype() == float32 ? "norm_sums_float32"
          : x.dtype() == float16       ? "norm_sums_float16"
                                       : "norm_sums_bfloat16";
      auto dispatch = plan_norm(device, name, x.size());
      gradients.emplace_back(make_dense(x, stream(), keep), dispatch);
      groups += dispatch.grid.width;
    }
  }
  outputs[0].set_data(allocator::malloc(outputs[0].nbytes()));
  // Two sums of each threadgroup.
  int count = 2 * std::max<size_t>(groups, 1);
  array sums({count}, float32, nullptr, {});
  sums.set_data(allocator::malloc(sums.nbytes()));
  keep(sums);

  if (groups > 0) {
    // They write apart from one another: no barrier between them.
    auto context = encoder.start_concurrent();
    uint32_t first = 0;
    for (const auto& [x, dispatch] : gradients) {
      encoder.set_compute_pipeline_state(dispatch.kernel);
      encoder.set_input_array(x, 0);
      encoder.set_output_array(sums, 1);
      encoder.set_bytes(static_cast<uint64_t>(dispatch.size), 2);
      encoder.set_bytes(first, 3);
      encoder.set_threadgroup_memory_length(dispatch.threadgroup_bytes, 0);
      encoder.dispatch_threadgroups(dispatch.grid, dispatch.threads);
      first += dispatch.grid.width;
    }
  }
  encoder.set_compute_pipeline_state(total.kernel);
  encoder.set_input_array(sums, 0);
  encoder.set_output_array(outputs[0], 1);
  encoder.set_bytes(static_cast<uint32_t>(groups), 2);
  encoder.set_threadgroup_memory_length(total.threadgroup_bytes, 0);
  encoder.dispatch_threadgroups(total.grid, total.threads);
}

} // namespace mlx_adadelta
