"""A user's project: every public name, used as it may be; test_typing checks it."""

from typing import Any

import mlx.core as mx
import mlx.optimizers
from mlx.nn.layers.base import Module
from mlx_adadelta._ext import has_metal  # the extension's own stub

from mlx_adadelta import (
    AdaDelta,
    __version__,
    adadelta_update,
    backends,
    clip_scale,
    match_layout,
    nonfinite,
)

native: bool = has_metal
version: str = __version__
names: tuple[str, ...] = backends()


def schedule(step: mx.array) -> mx.array:
    return mx.maximum(1 - 0.001 * step, 0.1)


def python_schedule(step: mx.array) -> float:
    return 1.0


def decays(path: str, w: mx.array) -> bool:
    return w.ndim > 1 and not path.endswith("bias")


AdaDelta(1.0)
AdaDelta(mx.array(1.0), 0.95, 1e-5)
AdaDelta(python_schedule, rho=0.9, eps=1e-6, maximize=True)
optimizer = AdaDelta(
    schedule,
    weight_decay=0.01,
    decoupled_weight_decay=True,
    decay_filter=decays,
    state_dtype=mx.float32,
    stochastic_rounding=True,
    seed=7,
    backend="cpu",
)
stock: mlx.optimizers.AdaDelta = optimizer
optimizer.learning_rate = 0.5
rate: mx.array = optimizer.learning_rate


def step(model: Module, parameters: Any, gradients: dict[str, Any]) -> mx.array:
    scale, norm = clip_scale(gradients, 1.0)
    optimizer.update(model, gradients, gradient_scale=scale, skip=nonfinite(gradients))
    parameters = optimizer.apply_gradients(gradients, parameters)
    model.update(match_layout(parameters, gradients))
    return norm


def one(w: mx.array, g: mx.array) -> mx.array:
    w, v, u = adadelta_update(w, g, g, g, 1.0, 0.9, 1e-6, backend="mlx", stream=mx.cpu)
    return w + v + u


def many(w: list[mx.array], g: tuple[mx.array, ...]) -> list[mx.array]:
    new, v, u = adadelta_update(w, g, g, g, mx.array(1.0), step=3, skip=False)
    return [*new, *v, *u]
