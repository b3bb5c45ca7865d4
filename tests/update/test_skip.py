"""Bad steps: skip, nonfinite, and loss scaling that overflows."""

from typing import Any

import mlx.core as mx
import pytest
from arrays import make_tensors
from checks import assert_same_trees
from mlx.utils import tree_map

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
