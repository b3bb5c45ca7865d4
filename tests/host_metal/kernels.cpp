// The Metal source as shipped, and the table of its entry points.

#include "executor.h"

#include <map>
#include <stdexcept>

#include "adadelta.metal" // from here on Metal's keywords are macros
#include "norm.metal"

void metal::threadgroup_barrier(mem_flags flags) {
  if (flags != mem_flags::mem_threadgroup) {
    throw std::logic_error("a barrier that orders no threadgroup memory");
  }
  host_metal::wait_at_barrier();
}

namespace host_metal {

static uint3 to_uint3(const Size& size) {
  return {size.x, size.y, size.z};
}

const Kernel* find_kernel(const std::string& name) {
  static const std::map<std::string, Kernel> kernels = {
#include "kernels.inc" // written by signatures.py
  };
  auto found = kernels.find(name);
  return found == kernels.end() ? nullptr : &found->second;
}

} // namespace host_metal
