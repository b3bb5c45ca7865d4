// The part of Metal and of MLX's Metal backend that csrc/eval_metal.cpp talks
// to. It checks what it is told as strictly as it can, then has the executor
// run the kernel on MLX's CPU stream. A violation is a std::logic_error.

#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <sstream>

#include "adadelta_step.h"
#include "executor.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/backend/metal/device.h"

// Called, where a program defines it, when an evaluation first calls Metal.
extern "C" __attribute__((weak)) void host_metal_on_encoding();

#define EXPORT __attribute__((visibility("default")))

// What kernels answer when asked for their largest threadgroup, and how many
// threadgroups at either end of a grid are run.
extern "C" {
EXPORT size_t host_metal_max_threads = 1024;
EXPORT size_t host_metal_most_groups = -1;
}

namespace host_metal {

namespace mx = mlx::core;

namespace {

bool recording = false;
bool starts = false; // the record is still empty
std::string record;
std::string source; // of the library that was compiled last

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) {
    throw std::logic_error(text("[host Metal] ", parts...));
  }
}

template <typename... Parts>
void note(const Parts&... parts) {
  if (recording) {
    record += text(parts..., "\n");
  }
}

struct Bytes {
  const char* begin;
  const char* end;

  bool operator==(const Bytes&) const = default;
};

struct Binding {
  std::optional<mx::array> array;
  bool output = false;
  std::string bytes; // where there is no array
};

// What was set since the last dispatch. Metal keeps bindings; the mock wants
// each dispatch to set its own, because a stale binding is a mistake.
struct Pending {
  const Kernel* kernel = nullptr;
  std::map<size_t, Binding> bindings;
  size_t threadgroup_bytes = 0;

  // Of an argument that some kernels have.
  template <typename T>
  std::optional<T> value(std::string_view name) const {
    for (const auto& argument : kernel->arguments) {
      if (argument.name == name) {
        T result;
        const auto& bytes = bindings.at(argument.index).bytes;
        std::memcpy(&result, bytes.data(), sizeof(T));
        return result;
      }
    }
    return {};
  }
};

void check_binding(const Argument& argument, const Binding& binding) {
  auto where = text("buffer ", argument.index, " (", argument.name, ")");
  if (argument.kind == Argument::kBytes) {
    require(binding.bytes.size() == argument.size, where, " has another size");
    return;
  }
  static const std::map<std::string, mx::Dtype> types = {
      {"float", mx::float32},
      {"half", mx::float16},
      {"bfloat", mx::bfloat16},
      {"float32_t", mx::float32},
      {"float16_t", mx::float16},
      {"bfloat16_t", mx::bfloat16},
      {"bool", mx::bool_},
      {"uint64_t", mx::uint64}};
  require(binding.array.has_value(), where, " is set to no array");
  auto dtype = binding.array->dtype();
  require(dtype == types.at(argument.type), where, " is set to ", dtype);
  require(
      binding.output == argument.writable, where, " is bound the other way");
}

// The bytes that the kernel reads or writes through each array.
std::map<std::string, Bytes> find_extents(const Pending& pending, Size grid) {
  std::map<std::string, Bytes> extents;
  auto n = pending.value<uint64_t>("n");
  auto tile = pending.value<mlx_adadelta::AdaDeltaTile>("tile");
  auto first = pending.value<uint32_t>("first");
  auto count = pending.value<uint32_t>("count");
  require(n || tile || count, pending.kernel->name, " has no size");
  size_t size = n ? *n
      : tile      ? static_cast<size_t>(grid.z) * tile->rows * tile->columns
                  : 2 * *count;
  const std::map<std::string, size_t> others = {
      {"lr", 1},
      {"gradient_scale", 1},
      {"skip", 1},
      {"step", 1},
      {"norm_out", 2},
      {"sums_out", 2 * grid.x}};
  for (const auto& argument : pending.kernel->arguments) {
    if (argument.kind != Argument::kArray) {
      continue;
    }
    const auto& array = *pending.bindings.at(argument.index).array;
    std::string name = argument.name;
    auto other = others.find(name);
    size_t wanted = other == others.end() ? size : other->second;
    bool part = name == "sums_out";
    size_t begin = part ? 2 * *first : 0;
    bool fits = part ? begin + wanted <= array.size() : wanted == array.size();
    require(fits, name, " has another size");
    if (tile && name == "g") {
      wanted = (grid.z - 1) * tile->batch_stride + tile->rows +
          (tile->columns - 1) * tile->column_stride;
    }
    size_t end = (begin + wanted) * array.itemsize();
    fits = array.offset() + end <= array.buffer_size();
    require(fits, name, " ends beyond its memory");
    auto* data = array.data<char>();
    extents[name] = {data + begin * array.itemsize(), data + end};
  }
  return extents;
}

void check_dispatch(const Pending& pending, Size grid, Size threads) {
  require(pending.kernel, "a dispatch without a kernel");
  require(
      grid.count() > 0 && threads.count() > 0, "an empty grid or threadgroup");
  require(threads.count() <= host_metal_max_threads, "too many threads");
  auto bindings = pending.bindings;
  bool staged = false;
  for (const auto& argument : pending.kernel->arguments) {
    if (argument.kind == Argument::kThreadgroup) {
      staged = true;
    } else {
      auto at = bindings.find(argument.index);
      require(at != bindings.end(), "buffer ", argument.index, " is not set");
      check_binding(argument, at->second);
      bindings.erase(at);
    }
  }
  require(bindings.empty(), pending.kernel->name, " has no use for a buffer");
  size_t size = pending.threadgroup_bytes;
  bool fits = size > 0 && size <= 32768 && size % 16 == 0; // on every GPU
  require(staged ? fits : size == 0, "threadgroup memory of ", size, " bytes");
  // An output may be its own input, exactly, and overlaps nothing else.
  auto extents = find_extents(pending, grid);
  for (const auto& [out, written] : extents) {
    for (const auto& [other, bytes] : extents) {
      bool in_place = out == other + "_out" && written == bytes;
      bool apart = written.end <= bytes.begin || bytes.end <= written.begin;
      bool allowed = !out.ends_with("_out") || out == other || in_place;
      require(allowed || apart, out, " overlaps ", other);
    }
  }
}

// Runs after the stream's earlier tasks, as a GPU would. Keeps alive nothing
// that MLX itself does not keep alive.
void enqueue(
    const Pending& pending,
    Size grid,
    Size threads,
    mx::Stream stream) {
  Launch launch{pending.kernel, grid, threads, {}, pending.threadgroup_bytes};
  std::map<size_t, std::string> bytes;
  std::vector<std::weak_ptr<mx::array::Data>> memory;
  for (const auto& [index, binding] : pending.bindings) {
    if (binding.array) {
      launch.buffers[index] = const_cast<char*>(binding.array->data<char>());
      memory.push_back(binding.array->data_shared_ptr());
    } else {
      bytes[index] = binding.bytes;
    }
  }
  mx::scheduler::enqueue(
      stream,
      [launch,
       groups = host_metal_most_groups,
       memory = std::move(memory),
       bytes = std::move(bytes)]() mutable {
        for (const auto& data : memory) {
          require(!data.expired(), "an array was freed before the kernel ran");
        }
        for (auto& [index, value] : bytes) {
          launch.buffers[index] = value.data();
        }
        run_with_fibers(launch, groups);
      });
}

Size to_size(const MTL::Size& size) {
  return {
      static_cast<uint32_t>(size.width),
      static_cast<uint32_t>(size.height),
      static_cast<uint32_t>(size.depth)};
}

} // namespace

struct Encoder : mx::metal::CommandEncoder {
  Encoder(mx::Stream stream, mx::metal::Device& device)
      : CommandEncoder(device, stream.index, device.residency_sets()),
        stream(stream) {}

  static Encoder& of(CommandEncoder* encoder) {
    return *static_cast<Encoder*>(encoder);
  }

  mx::Stream stream;
  Pending pending;
};

} // namespace host_metal

// --------------------------------- Metal ----------------------------------

// The messages that eval_metal.cpp and MLX's header send.
namespace NS::Private::Selector {
SEL s_krelease = "release";
} // namespace NS::Private::Selector

namespace MTL::Private::Selector {
SEL s_kmaxTotalThreadsPerThreadgroup = "maxTotalThreadsPerThreadgroup";
SEL s_ksetBytes_length_atIndex_ = "setBytes:length:atIndex:";
SEL s_ksetComputePipelineState_ = "setComputePipelineState:";
SEL s_ksetThreadgroupMemoryLength_atIndex_ =
    "setThreadgroupMemoryLength:atIndex:";
} // namespace MTL::Private::Selector

// An encoder's handle is its Pending, a pipeline's is its Kernel.
uintptr_t
objc_msgSend(void* self, SEL selector, uintptr_t a, uintptr_t b, uintptr_t c) {
  using namespace host_metal;
  std::string name = selector;
  auto* pending = static_cast<Pending*>(self);
  if (name == "maxTotalThreadsPerThreadgroup") {
    return host_metal_max_threads;
  } else if (name == "setComputePipelineState:") {
    pending->kernel = reinterpret_cast<const Kernel*>(a);
    if (host_metal_on_encoding) {
      host_metal_on_encoding();
    }
  } else if (name == "setBytes:length:atIndex:") {
    auto* bytes = reinterpret_cast<const char*>(a);
    pending->bindings[c] = {{}, false, std::string(bytes, b)};
  } else if (name == "setThreadgroupMemoryLength:atIndex:") {
    require(b == 0, "kernels have one threadgroup array");
    pending->threadgroup_bytes = a;
  } else {
    require(self == nullptr, "an unexpected message, ", name);
  }
  return 0;
}

// ----------------------------- MLX's backend ------------------------------

namespace mlx::core::metal {

using host_metal::note;
using host_metal::require;

ResidencySets::ResidencySets(MTL::Device*) {}
ResidencySets::~ResidencySets() = default;

Device::Device() : residency_sets_(nullptr) {}

Device& device(mlx::core::Device) {
  static auto* device = new Device;
  return *device;
}

// There is one library, which needs no handle.
MTL::Library* Device::get_library(
    const std::string& name,
    const std::string& path) {
  note("library ", name, " ", path);
  return nullptr;
}

MTL::Library* Device::get_library(
    const std::string& name,
    const CompileOptions& options,
    const std::function<std::string()>& builder) {
  static std::mutex mutex;
  static std::set<std::string> compiled;
  std::lock_guard lock(mutex);
  if (compiled.insert(name).second) {
    host_metal::source = builder();
  }
  require(options.math_mode == MathMode::Safe, "fast math changes results");
  note("library ", name, " compiled");
  return nullptr;
}

MTL::ComputePipelineState* Device::get_kernel(
    const std::string& name,
    MTL::Library*,
    const std::string&,
    const MTLFCList&,
    const std::vector<MTL::Function*>&) {
  auto* kernel = host_metal::find_kernel(name);
  require(kernel, "there is no kernel ", name);
  return reinterpret_cast<MTL::ComputePipelineState*>(
      const_cast<host_metal::Kernel*>(kernel));
}

CommandEncoder::CommandEncoder(Device& device, int, ResidencySets& sets)
    : device_(device), residency_sets_(sets) {}

CommandEncoder::~CommandEncoder() = default;

CommandEncoder& get_command_encoder(Stream stream) {
  static thread_local std::map<int, host_metal::Encoder> encoders;
  auto& gpu = device(stream.device);
  return encoders.try_emplace(stream.index, stream, gpu).first->second;
}

MTL::ComputeCommandEncoder* CommandEncoder::get_command_encoder() {
  return reinterpret_cast<MTL::ComputeCommandEncoder*>(
      &host_metal::Encoder::of(this).pending);
}

// A barrier is due by MLX's rule: before a dispatch that reads or writes what
// an earlier one wrote, or writes what an earlier one read. What is written
// concurrently counts for those that come after.
static MTL::Resource* resource(const array& a) {
  return static_cast<MTL::Resource*>(const_cast<void*>(a.buffer().ptr()));
}

void CommandEncoder::set_input_array(
    const array& a,
    int index,
    int64_t offset) {
  require(offset == 0, "offsets are not mocked");
  next_inputs_.insert(resource(a));
  needs_barrier_ |= prev_outputs_.contains(resource(a));
  host_metal::Encoder::of(this).pending.bindings[index] = {a, false, ""};
}

void CommandEncoder::set_output_array(array& a, int index, int64_t offset) {
  set_input_array(a, index, offset);
  (concurrent_ ? concurrent_outputs_ : next_outputs_).insert(resource(a));
  needs_barrier_ |= !concurrent_ && prev_inputs_.contains(resource(a));
  host_metal::Encoder::of(this).pending.bindings[index].output = true;
}

void CommandEncoder::maybeInsertBarrier() {
  if (std::exchange(host_metal::starts, false)) {
    needs_barrier_ = false; // all earlier work counts as done
    prev_inputs_.clear();
    prev_outputs_.clear();
  }
  if (needs_barrier_) {
    note("barrier");
    needs_barrier_ = false;
    prev_inputs_.swap(next_inputs_);
    prev_outputs_.swap(next_outputs_);
  } else {
    prev_inputs_.insert(next_inputs_.begin(), next_inputs_.end());
    prev_outputs_.insert(next_outputs_.begin(), next_outputs_.end());
  }
  next_inputs_.clear();
  next_outputs_.clear();
}

void CommandEncoder::add_temporary(array x) {
  auto stream = host_metal::Encoder::of(this).stream;
  cpu::get_command_encoder(stream).add_temporary(std::move(x));
}

void CommandEncoder::dispatch_threadgroups(MTL::Size grid, MTL::Size threads) {
  auto& encoder = host_metal::Encoder::of(this);
  auto pending = std::exchange(encoder.pending, {});
  maybeInsertBarrier();
  auto groups = host_metal::to_size(grid);
  auto lanes = host_metal::to_size(threads);
  host_metal::check_dispatch(pending, groups, lanes);
  size_t bytes = 0;
  for (const auto& [index, binding] : pending.bindings) {
    bytes += binding.array ? binding.array->nbytes() : 0;
  }
  note("dispatch ", pending.kernel->name, " ", bytes);
  host_metal::enqueue(pending, groups, lanes, encoder.stream);
}

} // namespace mlx::core::metal

// ------------------------------- For tests --------------------------------

extern "C" {

/** Starts an empty record of libraries, dispatches and barriers. */
EXPORT void host_metal_start_record() {
  host_metal::recording = true;
  host_metal::starts = true;
  host_metal::record.clear();
}

/** Ends the record and returns it: a line for each. */
EXPORT const char* host_metal_end_record() {
  host_metal::recording = false;
  return host_metal::record.c_str();
}

/** The source of the library that was compiled last. */
EXPORT const char* host_metal_source() {
  return host_metal::source.c_str();
}
}
