// What mx.fast.metal_kernel makes and evaluates, on MLX's CPU stream. Written
// from mlx/backend/metal/custom_kernel.cpp of MLX 0.32.1; see custom_kernel.py.

#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iostream>

#include "executor.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace mx = mlx::core;
namespace nb = nanobind;

namespace host_metal {

namespace {

// What new memory is full of, and how much of it no kernel may write to.
constexpr char kByte = '\xff';
constexpr size_t kGuard = 4096;

using Sizes = std::array<uint32_t, 3>;
// Of each input: which of "shape", "strides" and "ndim" the function takes.
using Infos = std::vector<std::vector<std::string>>;

// As in MLX it has no vmap, jvp, vjp, output_shapes or is_equivalent.
class CustomKernel : public mx::Primitive {
 public:
  CustomKernel(mx::Stream stream, Launch launch, Sizes grid, Infos infos)
      : Primitive(stream), launch_(launch), grid_(grid), infos_(infos) {}

  const char* name() const override {
    return "CustomKernel";
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&)
      override {
    throw std::logic_error("the stand-in runs on the CPU");
  }

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    auto launch = launch_;
    auto axes = std::make_shared<std::vector<int>>();
    axes->reserve(inputs.size());
    size_t index = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const auto& in = inputs[i];
      encoder.set_input_array(in);
      launch.buffers.at(index++) = const_cast<char*>(in.data<char>());
      axes->push_back(in.ndim());
      for (const auto& info : infos_[i]) {
        if (in.ndim() > 0) {
          const void* bytes = &axes->back();
          if (info == "shape") {
            bytes = in.shape().data();
          } else if (info == "strides") {
            bytes = in.strides().data();
          }
          launch.buffers.at(index++) = const_cast<void*>(bytes);
        }
      }
    }
    std::vector<char*> ends;
    for (auto& out : outputs) {
      out.set_data(mx::allocator::malloc(out.nbytes() + kGuard));
      std::memset(out.data<char>(), kByte, out.nbytes() + kGuard);
      encoder.set_output_array(out);
      launch.buffers.at(index++) = out.data<char>();
      ends.push_back(out.data<char>() + out.nbytes());
    }
    // MLX dispatches threads. Here all threadgroups must be whole, and the host
    // runs one lane after another.
    auto [x, y, z] = grid_;
    const auto& threads = launch.threads;
    if (x % threads.x != 0 || y % threads.y != 0 || z % threads.z != 0) {
      throw std::logic_error("a threadgroup is not whole");
    }
    launch.grid = {x / threads.x, y / threads.y, z / threads.z};
    // The inputs keep their shapes and strides.
    encoder.dispatch([launch, inputs, axes, ends] {
      run_with_fibers(launch);
      for (auto* end : ends) {
        if (std::any_of(end, end + kGuard, [](char x) { return x != kByte; })) {
          std::cerr
              << "[host Metal] a kernel wrote behind the end of an array\n";
          std::abort();
        }
      }
    });
  }

 private:
  Launch launch_;
  Sizes grid_;
  Infos infos_;
};

// The arrays that the kernel of a library will write: see custom_kernel.py for
// what the library holds.
std::vector<mx::array> make_arrays(
    const std::string& library,
    const std::vector<mx::array>& inputs,
    const Infos& infos,
    const std::vector<std::vector<int>>& shapes,
    const std::vector<mx::Dtype>& dtypes,
    Sizes grid,
    Sizes threads) {
  auto* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  auto* find = handle ? dlsym(handle, "host_metal_kernel") : nullptr;
  if (find == nullptr) {
    throw std::runtime_error(dlerror());
  }
  Launch launch{};
  launch.kernel = reinterpret_cast<const Kernel* (*)(void (*)(), size_t*)>(
      find)(wait_at_barrier, &launch.threadgroup_bytes);
  launch.threads = {threads[0], threads[1], threads[2]};
  std::vector<mx::Shape> output_shapes;
  for (const auto& shape : shapes) {
    output_shapes.emplace_back(shape.begin(), shape.end());
  }
  auto primitive = std::make_shared<CustomKernel>(
      mx::default_stream(mx::default_device()), launch, grid, infos);
  return mx::array::make_arrays(
      std::move(output_shapes), dtypes, primitive, inputs);
}

} // namespace

} // namespace host_metal

NB_MODULE(_custom_kernel, m) {
  nb::module_::import_("mlx.core");
  m.def("make_arrays", &host_metal::make_arrays);
}
