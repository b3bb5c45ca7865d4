"""The options together, and with what else a training loop is made of."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from arrays import to_float64
from checks import assert_same_bits, assert_same_trees
from mlx.utils import tree_flatten, tree_map
from models import compiled_step, decay, eager_step, make_tree, run, save_and_load
from tables import HALVES

import mlx_adadelta
from mlx_adadelta import AdaDelta, clip_scale, nonfinite

WIDE = (None, mx.float32)
# The type of the parameters, state_dtype, stochastic rounding.
MODES = [
    (dtype, state_dtype, stochastic)
    for dtype in (mx.float32, *HALVES)
    for state_dtype in (*WIDE, *(HALVES if dtype == mx.float32 else (dtype,)))
    for stochastic in (False, True)
]


def name_of(x: Any) -> str:
    return str(x).rpartition(".")[-1]


def matrices(path: str, w: mx.array) -> bool:
    return w.ndim > 1


# -------------------------------- Compiled steps ------------------------------


def constant(step: mx.array) -> float:
    return 0.25


@pytest.mark.parametrize("schedule", [decay, constant])
def test_all_options_at_once_compiled(backend: str, schedule: Any) -> None:
    """The third of five steps is not finite, and skipped."""
    results = []
    for compiled in (False, True):
        optimizer = AdaDelta(
            schedule,
            weight_decay=0.1,
            decoupled_weight_decay=True,
            decay_filter=matrices,
            maximize=True,
            state_dtype=mx.float32,
            # MLX compiles Philox in operations for seconds.
            stochastic_rounding=backend != "mlx",
            seed=7,
            backend=backend,
        )
        model = make_tree(0, mx.bfloat16)
        optimizer.init(model)

        def step(gradients: Any, model=model, optimizer=optimizer) -> None:
            scale, _ = clip_scale(gradients, 1.0)
            new = optimizer.apply_gradients(
                gradients, model, gradient_scale=scale, skip=nonfinite(gradients)
            )
            model.update(new)

        state = [model, optimizer.state]
        if compiled:
            step = mx.compile(step, inputs=state, outputs=state)
        for i in range(5):
            gradients = make_tree(i + 1, mx.bfloat16)
            if i == 2:
                gradients["norm"]["weight"][0] = mx.inf
            step(gradients)
            mx.eval(state)
        assert optimizer.step.item() == 4
        rate = schedule(mx.array(3))
        assert optimizer.learning_rate.item() == pytest.approx(float(rate))
        results.append([model, optimizer.state])
    if backend == "mlx":  # fused by MLX, where some compilers contract
        for (path, x), (_, y) in zip(*map(tree_flatten, results), strict=True):
            np.testing.assert_allclose(
                to_float64(x), to_float64(y), 2**-6, 1e-4, err_msg=path
            )
    else:
        assert_same_trees(backend, *results)


@pytest.mark.parametrize("make_step", [eager_step, compiled_step])
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_filter_spares_biases_and_norms(
    backend: str, decoupled: bool, make_step: Any
) -> None:
    seen = []

    def decays(path: str, w: mx.array) -> bool:
        seen.append(path)
        return matrices(path, w)

    optimizer = AdaDelta(
        1.0,
        weight_decay=0.5,
        decoupled_weight_decay=decoupled,
        decay_filter=decays,
        backend=backend,
    )
    model, before = make_tree(0), dict(tree_flatten(make_tree(0)))
    optimizer.init(model)
    step = make_step(optimizer, model)
    for _ in range(2):
        step(tree_map(mx.zeros_like, make_tree(0)))
    assert seen[: len(before)] == list(before)
    for path, w in tree_flatten(model):
        if w.ndim == 1:
            assert_same_bits(w, before[path], path)
        elif decoupled:
            assert_same_bits(w, before[path] / 4, path)
        else:
            assert (mx.abs(w) < mx.abs(before[path])).all().item(), path


def test_a_loaded_state_goes_on_in_a_compiled_step(native: str, tmp_path: Path) -> None:
    def make() -> AdaDelta:
        return AdaDelta(decay, state_dtype=mx.float32, backend=native)

    expected_optimizer = make()
    expected = run(expected_optimizer, make_tree(0), range(5))

    first = make()
    model = run(first, make_tree(0), range(3))
    second = make()
    second.init(model)
    second.state = save_and_load(first.state, tmp_path / "state.safetensors")
    step = compiled_step(second, model)
    for i in range(3, 5):
        step(make_tree(i + 1))
    assert_same_trees(
        native, [model, second.state], [expected, expected_optimizer.state]
    )


# --------------------------------- Checkpoints --------------------------------


@pytest.mark.parametrize(("dtype", "state_dtype", "stochastic"), MODES, ids=name_of)
def test_a_resumed_run_is_the_uninterrupted_one(
    backend: str,
    dtype: mx.Dtype,
    state_dtype: mx.Dtype | None,
    stochastic: bool,
    tmp_path: Path,
) -> None:
    def make() -> AdaDelta:
        return AdaDelta(
            decay,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic,
            seed=3,
            backend=backend,
        )

    whole = make()
    expected = run(whole, make_tree(0, dtype), range(6))

    first = make()
    parameters = run(first, make_tree(0, dtype), range(3))
    second = make()
    second.state = save_and_load(first.state, tmp_path / "state.safetensors")
    parameters = save_and_load(parameters, tmp_path / "weights.safetensors")
    parameters = run(second, parameters, range(3, 6))
    # To the bit on a GPU, too.
    assert_same_trees("cpu", [parameters, second.state], [expected, whole.state])
    for path, x in tree_flatten(second.state):
        assert isinstance(x, mx.array)
        if x.ndim:
            assert x.dtype == (state_dtype or dtype), path


@pytest.mark.parametrize(("dtype", "state_dtype", "stochastic"), MODES, ids=name_of)
@pytest.mark.parametrize("kept", [mx.float32, *HALVES], ids=name_of)
def test_stocks_checkpoint_loads_into_any_mode(
    backend: str,
    dtype: mx.Dtype,
    state_dtype: mx.Dtype | None,
    stochastic: bool,
    kept: mx.Dtype,
    tmp_path: Path,
) -> None:
    """Whatever its state's type: float32 of 16-bit parameters, or the reverse."""
    stock = optim.AdaDelta(1.0, 0.95)
    parameters = run(stock, make_tree(0, dtype), range(3))
    state = tree_map(lambda x: x.astype(kept) if x.ndim else x, stock.state)
    state = save_and_load(state, tmp_path / "state.safetensors")
    ours = AdaDelta(
        1.0,
        0.95,
        state_dtype=state_dtype,
        stochastic_rounding=stochastic,
        backend=backend,
    )
    ours.state = state
    flat = dict(tree_flatten(state))
    paths, weights = zip(*tree_flatten(parameters), strict=True)
    gradients = make_tree(9, dtype)
    expected = mlx_adadelta.adadelta_update(
        list(weights),
        [g for _, g in tree_flatten(gradients)],
        *(
            [flat[f"{path}.{name}"].astype(state_dtype or kept) for path in paths]
            for name in "vu"
        ),
        1.0,
        0.95,
        stochastic_rounding=stochastic,
        step=3,
        backend=backend,
    )
    new = dict(tree_flatten(ours.apply_gradients(gradients, parameters)))
    after = dict(tree_flatten(ours.state))
    w = [new[path] for path in paths]
    v, u = ([after[f"{path}.{name}"] for path in paths] for name in "vu")
    assert_same_trees("cpu", [w, v, u], list(expected))
    assert {x.dtype for x in w} == {dtype}
    assert {x.dtype for x in v + u} == {state_dtype or kept}
    assert ours.step.item() == 4
