#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

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
// For fewer elements a second thread costs more than it saves.
constexpr size_t kParallel = 1 << 17;
// The same for a thread that has a group for itself, ahead of the stream.
constexpr size_t kAhead = 1 << 13;

// One parameter's update.
struct Work {
  Elements elements;
  size_t size;
  AdaDeltaTile tile; // of a transposed gradient; no rows: it lies as w does
  AdaDeltaParams params;
  // Read when the stream gets there.
  const float* lr;
  const float* gradient_scale;
  const bool* skip;
  const uint64_t* step;
  size_t units = 0;

  Scalars scalars() const {
    RandomKeys keys{};
    if (params.stochastic != 0) {
      keys = adadelta_keys(*step, params);
    }
    return {*lr, *gradient_scale, *skip, params, keys};
  }
};

size_t count_units(const Work& work) {
  const auto& tile = work.tile;
  if (tile.rows == 0) {
    return (work.size + kUnit - 1) / kUnit;
  }
  TiledUnits units(work.elements, tile);
  size_t matrices = work.size / (static_cast<size_t>(tile.rows) * tile.columns);
  return matrices * units.across * units.down;
}

void update_unit(const Work& work, size_t unit) {
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

// A group of parameters' updates.
class UpdateJob : public Job {
 public:
  explicit UpdateJob(size_t parameters) {
    group_.reserve(parameters);
  }

  void add(Work work) {
    work.units = count_units(work);
    units += work.units;
    size_ += work.size;
    helpers = size_ / kParallel;
    if (ready && size_ >= kAhead) {
      helpers = std::max<size_t>(helpers, 1);
    }
    group_.push_back(std::move(work));
  }

  void run_unit(size_t unit) override {
    auto work = group_.begin();
    for (; unit >= work->units; ++work) {
      unit -= work->units;
    }
    update_unit(*work, unit);
  }

 private:
  std::vector<Work> group_;
  size_t size_ = 0;
};

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
  auto job = std::make_shared<UpdateJob>(params_.size());
  job->ready = inputs_are_complete_;
  evaluation.prepare(stream(), [&](array copy) {
    encoder.add_temporary(std::move(copy));
    job->ready = false; // the stream makes the copy
  });
  for (size_t i = 0; i < params_.size(); ++i) {
    const auto& operands = evaluation.operands()[i];
    Work work{
        .elements = elements_of(operands, &outputs[3 * i]),
        .size = outputs[3 * i].size(),
        .tile = operands.tile,
        .params = params_[i],
        .lr = scalar(inputs, 0).data<float>(),
        .gradient_scale = scalar(inputs, 1).data<float>(),
        .skip = scalar(inputs, 2).data<bool>(),
        .step = scalar(inputs, 3).data<uint64_t>()};
    job->add(std::move(work));
  }
  dispatch(stream(), job, [&] { evaluation.finish(); });
  evaluation.finish();
}

} // namespace mlx_adadelta
