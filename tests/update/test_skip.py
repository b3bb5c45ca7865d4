"""Bad steps: skip, nonfinite, and loss scaling that overflows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from arrays import make_tensors
from checks import assert_same_trees
from mlx.utils import tree_flatten, tree_map

import mlx_adadelta
from mlx_adadelta import AdaDelta, nonfinite


def copies(tree: Any) -> Any:
    return tree_map(lambda x: x + mx.zeros_like(x), tree)


@pytest.mark.parametrize("layout", ["same", "transposed"])
@pytest.mark.parametrize("held", [False, True])
def test_skipped_arrays_keep_every_bit(backend, layout, held):
    t = make_tensors((65, 70), layouts=("same", layout, layout, "same"))
    expected = copies(t)
    mx.eval(expected)
    keep = list(t) if held else None
    new = mlx_adadelta.adadelta_update(
        *t, 0.7, weight_decay=0.1, skip=mx.array(True), backend=backend
    )
    del t
    assert_same_trees("cpu", new, (expected.w, expected.v, expected.u))
    del keep


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_skipped_float64_state_keeps_every_bit(backend):
    """No kernel reads it, and float32 does not hold it."""
    if backend not in mlx_adadelta.backends():
        pytest.skip(f"backend {backend!r} cannot run here")
    with mx.stream(mx.cpu):
        w = mx.ones((65,))
        v = mx.ones_like(w).astype(mx.float64) / 3
        new = mlx_adadelta.adadelta_update(w, w, v, v, 0.7, skip=True, backend=backend)
        assert_same_trees("cpu", new, (w, v, v))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("as_float", [False, True])
def test_a_skipped_step_never_was(backend, compiled, as_float):
    """State, step and schedule after good, bad, good are those of good, good."""

    def schedule(step: mx.array) -> Any:
        return 0.5 if as_float else 1.0 / (step + 1)

    def run(pattern: list[bool]) -> Any:
        optimizer = AdaDelta(schedule, backend=backend)
        parameters = {"w": mx.ones((3, 5)), "b": mx.ones(5)}
        optimizer.init(parameters)

        def step(parameters: Any, bad: mx.array) -> Any:
            g = mx.where(bad, mx.array(mx.nan), mx.array(0.3))
            gradients = tree_map(lambda w: g * w, parameters)
            return optimizer.apply_gradients(
                gradients, parameters, skip=nonfinite(gradients)
            )

        if compiled:
            step = mx.compile(step, inputs=[optimizer.state], outputs=[optimizer.state])
        for bad in pattern:
            parameters = step(parameters, mx.array(bad))
            mx.eval(parameters, optimizer.state)
        return parameters, optimizer.state

    expected = run([False, False])
    got = run([False, True, True, False])
    assert got[1]["step"].item() == 2
    assert_same_trees(backend, got, expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -2.0], False),
        ([1.0, float("nan")], True),
        ([float("-inf"), 0.0], True),
        ([3e38, -3e38], False),
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_nonfinite(values, expected, dtype):
    gradients = {"a": [mx.zeros((0,)), mx.ones(3)], "b": mx.array(values).astype(dtype)}
    flag = nonfinite(gradients)
    assert flag.dtype == mx.bool_
    assert flag.shape == ()
    assert flag.item() is expected


def test_nonfinite_of_nothing():
    assert nonfinite({}).item() is False


def test_loss_scaling_in_float16_survives_its_overflows(backend):
    """The scale doubles every third good step and halves on a bad one."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    model.set_dtype(mx.float16)
    optimizer = AdaDelta(
        1.0, state_dtype=mx.float32, stochastic_rounding=True, backend=backend
    )
    x = mx.random.normal((32, 8)).astype(mx.float16)
    y = x.sum(axis=1, keepdims=True)

    def scaled_loss(model: nn.Module, scale: mx.array) -> mx.array:
        return mx.square(model(x) - y).mean() * scale.astype(mx.float16)

    loss_and_grad = nn.value_and_grad(model, scaled_loss)
    scale, skipped, losses = mx.array(2.0**12), 0, []
    for step in range(60):
        loss, gradients = loss_and_grad(model, scale)
        bad = nonfinite(gradients)
        optimizer.update(model, gradients, gradient_scale=1 / scale, skip=bad)
        losses.append(loss.astype(mx.float32) / scale)
        mx.eval(model.parameters(), optimizer.state, losses)
        skipped += bad.item()
        scale = scale / 2 if bad.item() else scale * (2 if step % 3 == 0 else 1)
    assert 0 < skipped < 30
    assert optimizer.step.item() == 60 - skipped
    for path, w in tree_flatten(model.parameters()):
        assert mx.isfinite(w).all().item(), path
    finite = [loss.item() for loss in losses if mx.isfinite(loss).item()]
    assert finite[-1] < finite[0]
