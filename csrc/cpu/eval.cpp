#include <memory>

#include "adadelta.h"
#include "job.h"
#include "layout.h"
#include "linear.h"
#include "mlx/backend/cpu/encoder.h"
#include "strips.h"

namespace mlx_adadelta {

using namespace mlx::core;

namespace {

// A thread takes this many elements at a time.
constexpr size_t kUnit = 1 << 16;

Type type_of(const array& x) {
  return x.dtype() == float32 ? Type::float32
      : x.dtype() == float16  ? Type::float16
                              : Type::bfloat16;
}

// How a matrix is cut into units of strips.
struct StripUnits {
  size_t strip_rows;
  size_t width;
  size_t across;
  size_t height;
  size_t shift; // strips end where g's cache lines do, if its columns agree
  size_t down;

  explicit StripUnits(const Work& work) {
    size_t size = size_of(work.elements.g_type);
    strip_rows = kStripBytes / size;
    width = std::min<size_t>(work.tile.columns, kStripColumns);
    across = (work.tile.columns + width - 1) / width;
    height = std::max<size_t>(1, kStripsUnit / (width * strip_rows));
    height *= strip_rows;
    auto address = reinterpret_cast<uintptr_t>(work.elements.g);
    shift = address % kStripBytes / size;
    down = (work.tile.rows + shift + height - 1) / height;
  }
};

void run_strips(const Work& work, size_t unit) {
  StripUnits units(work);
  const auto& tile = work.tile;
  size_t batch = unit / (units.across * units.down);
  size_t row = unit / units.across % units.down * units.height;
  Region region;
  region.row = std::max(row, units.shift) - units.shift;
  region.row_end =
      std::min<size_t>(row + units.height - units.shift, tile.rows);
  region.first_end =
      std::min<size_t>(row + units.strip_rows - units.shift, tile.rows);
  region.column = unit % units.across * units.width;
  region.column_end =
      std::min<size_t>(region.column + units.width, tile.columns);
  uint64_t place = batch * tile.rows * tile.columns;
  size_t g_size = size_of(work.elements.g_type);
  auto matrix = work.elements.at(place);
  matrix.g = work.elements.g + batch * tile.batch_stride * g_size;
  auto update = g_size == 4 ? update_strips<uint32_t> : update_strips<uint16_t>;
  auto* buffer = scratch(work.scratch_bytes);
  update(matrix, tile, region, place, buffer, work.scalars());
}

void run_unit(const Work& work, size_t unit) {
  if (work.tile.rows != 0) {
    run_strips(work, unit);
    return;
  }
  size_t begin = unit * kUnit;
  size_t n = std::min(kUnit, work.size - begin);
  update(work.elements.at(begin), n, begin, work.scalars());
}

void plan(Work& work) {
  const auto& tile = work.tile;
  if (tile.rows == 0) {
    work.units = (work.size + kUnit - 1) / kUnit;
    return;
  }
  StripUnits units(work);
  size_t matrices = work.size / (static_cast<size_t>(tile.rows) * tile.columns);
  work.units = matrices * units.across * units.down;
  work.scratch_bytes = size_of(work.elements.g_type) == 4
      ? Turned<uint32_t>::buffer_bytes(units.width)
      : Turned<uint16_t>::buffer_bytes(units.width);
}

Elements elements_of(const Operands& x, array* outputs) {
  return {
      .w_type = type_of(x.w.source),
      .g_type = type_of(x.g.source),
      .state_type = type_of(x.v.source),
      .w = x.w.source.data<std::byte>(),
      .g = x.g.source.data<std::byte>(),
      .v = x.v.source.data<std::byte>(),
      .u = x.u.source.data<std::byte>(),
      .w_out = outputs[0].data<std::byte>(),
      .v_out = outputs[1].data<std::byte>(),
      .u_out = outputs[2].data<std::byte>()};
}

} // namespace

void AdaDeltaUpdate::eval_cpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  if (is_done(outputs)) {
    return;
  }
  Evaluation evaluation(inputs, outputs);
  auto& encoder = cpu::get_command_encoder(stream());
  // Shared, because MLX copies the task several times on its way.
  auto job = std::make_shared<Job>();
  job->group.reserve(params_.size());
  evaluation.make_copies(
      stream(), [&](array copy) { encoder.add_temporary(std::move(copy)); });
  evaluation.place_outputs();
  for (size_t i = 0; i < params_.size(); ++i) {
    const auto& operands = evaluation.operands()[i];
    Work work{
        .elements = elements_of(operands, &outputs[3 * i]),
        .size = outputs[3 * i].size(),
        .tile = operands.g.tile,
        .params = params_[i],
        .lr = scalar(inputs, 0).data<float>(),
        .gradient_scale = scalar(inputs, 1).data<float>(),
        .skip = scalar(inputs, 2).data<bool>(),
        .step = scalar(inputs, 3).data<uint64_t>()};
    plan(work);
    job->add(std::move(work));
  }
  try {
    encoder.dispatch([job] { run(job); });
  } catch (...) {
    // The task may be queued all the same: MLX counts some tasks with a second
    // one. Whatever has begun is finished while its arrays are held.
    if (!job->cancel()) {
      job->wait();
      evaluation.finish();
    }
    throw;
  }
  evaluation.finish();
}

} // namespace mlx_adadelta
