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

void run_unit(const Work& work, size_t unit) {
  const auto& x = work.elements;
  if (work.tile.rows != 0) {
    auto update =
        x.g_type == float32 ? update_tiled<uint32_t> : update_tiled<uint16_t>;
    update(x, work.tile, unit, work.scalars());
    return;
  }
  size_t begin = unit * kUnit;
  size_t n = std::min(kUnit, work.size - begin);
  update(x.at(begin), n, begin, work.scalars());
}

void plan(Work& work) {
  const auto& tile = work.tile;
  if (tile.rows == 0) {
    work.units = (work.size + kUnit - 1) / kUnit;
    return;
  }
  TiledUnits units(work.elements, tile);
  size_t matrices = work.size / (static_cast<size_t>(tile.rows) * tile.columns);
  work.units = matrices * units.across * units.down;
}

Elements elements_of(const Operands& x, array* outputs) {
  return {
      .w_type = x.w.source.dtype(),
      .g_type = x.g.source.dtype(),
      .state_type = x.v.source.dtype(),
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
