"""The operation under MLX's function transforms, against plain operations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from arrays import Tensors, graph, make_tensors, to_float64
from checks import assert_same_trees
from mlx.utils import tree_flatten
from tables import DTYPES, TOLERANCE, Types

from mlx_adadelta import adadelta_update

LR = mx.array(0.75)
Function = Callable[..., list[mx.array]]


def make_update(backend: str) -> Function:
    """(learning rate, w, g, v, u of each tensor) -> w, v, u of each tensor."""

    def update(lr: mx.array, *flat: mx.array) -> list[mx.array]:
        lists = [list(flat[i::4]) for i in range(4)]
        new = adadelta_update(*lists, lr, backend=backend)
        return [x for wvu in zip(*new, strict=True) for x in wvu]

    return update


def assert_all_close(actual: list[mx.array], expected: list[mx.array]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        rtol, atol = TOLERANCE[x.dtype]
        scale = 1 + np.abs(to_float64(y)).max(initial=0)
        np.testing.assert_allclose(
            to_float64(x), to_float64(y), 8 * rtol, 8 * atol * scale
        )


def compare(native: str, run: Callable[[Function], Any]) -> list[mx.array]:
    """Runs something with the native update and with plain operations."""
    new, expected = (
        [x for _, x in tree_flatten(run(make_update(backend)))]
        for backend in (native, "mlx")
    )
    assert_all_close(new, expected)
    return new


def flat(*tensors: Tensors) -> list[mx.array]:
    return [x for t in tensors for x in t]


# ------------------------------------ vmap ------------------------------------


@pytest.mark.parametrize("types", DTYPES, ids=str)
def test_vmap(native: str, types: Types) -> None:
    inputs = flat(make_tensors((3, 5, 7), types), make_tensors((3, 2), types, seed=1))
    axes = (None, *[0] * 8)
    new = compare(native, lambda update: mx.vmap(update, axes)(LR, *inputs))
    # A batch of updates is the update of a batch.
    for x, y in zip(new, make_update(native)(LR, *inputs), strict=True):
        assert x.shape == y.shape
    assert_all_close(new, make_update("mlx")(LR, *inputs))


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_vmap_over_other_axes(native: str, axis: int) -> None:
    inputs, axes = make_tensors((3, 5, 7)), (None, *[axis] * 4)
    compare(native, lambda update: mx.vmap(update, axes, axis)(LR, *inputs))


@pytest.mark.parametrize("batched", ["w", "g", "wg", "vu", "gvu"])
def test_vmap_over_some_inputs(native: str, batched: str) -> None:
    batch, single = make_tensors((3, 5, 7)), make_tensors((5, 7), seed=1)
    first = [getattr(batch if name in batched else single, name) for name in "wgvu"]
    second = list(make_tensors((4,), seed=2))  # none of the other is mapped
    axes = (None, *(0 if name in batched else None for name in "wgvu"), *[None] * 4)
    compare(native, lambda update: mx.vmap(update, axes)(LR, *first, *second))


def test_vmap_over_learning_rates(native: str) -> None:
    rates = mx.array([0.0, 0.5, 1.0])
    inputs = make_tensors((5, 7))
    new = mx.vmap(make_update(native), (0, *[None] * 4))(rates, *inputs)
    for i in range(3):
        alone = make_update("mlx")(rates[i], *inputs)
        assert_all_close([x[i] for x in new], alone)


def test_vmap_twice(native: str) -> None:
    inputs = make_tensors((2, 3, 5))
    axes = (None, *[0] * 4)
    new = mx.vmap(mx.vmap(make_update(native), axes), axes)(LR, *inputs)
    assert_all_close(new, make_update("mlx")(LR, *inputs))


def test_vmap_over_options(native: str) -> None:
    """Some models of a batch take a bad step, each scales its gradients."""
    skip = mx.array([False, True, False])
    scale = mx.array([1.0, 0.5, 0.25])
    inputs = make_tensors((3, 5, 7))

    def update(skip: mx.array, scale: mx.array, *wgvu: mx.array) -> list[mx.array]:
        options = {"skip": skip, "gradient_scale": scale, "backend": native}
        return list(adadelta_update(*wgvu, LR, **options))

    new = mx.vmap(update)(skip, scale, *inputs)
    for i in range(3):
        w, g, v, u = (x[i] for x in inputs)
        alone = make_update("mlx")(LR, w, scale[i] * g, v, u)
        assert_all_close([x[i] for x in new], [w, v, u] if i == 1 else alone)


# --------------------------------- Derivatives --------------------------------


def two(types: Types, seed: int) -> tuple[Tensors, Tensors]:
    return make_tensors((5, 7), types, seed=seed), make_tensors(
        (3,), types, seed=seed + 1
    )


@pytest.mark.parametrize("types", DTYPES, ids=str)
def test_jvp(kernel: str, types: Types) -> None:
    primals = [LR, *flat(*two(types, seed=0))]
    tangents = [mx.array(0.5), *flat(*two(types, seed=2))]
    compare(kernel, lambda update: mx.jvp(update, primals, tangents))


def test_jvp_of_some_inputs(kernel: str) -> None:
    t, tangent = make_tensors((5, 7)), make_tensors((5, 7), seed=2)

    def jvp(update: Function) -> Any:
        def of_two(g: mx.array, u: mx.array) -> list[mx.array]:
            return update(LR, t.w, g, t.v, u)

        return mx.jvp(of_two, [t.g, t.u], [tangent.g, tangent.u])

    compare(kernel, jvp)


@pytest.mark.parametrize("types", DTYPES, ids=str)
def test_vjp(kernel: str, types: Types) -> None:
    primals = [LR, *flat(*two(types, seed=0))]
    cotangents = [x for t in two(types, seed=2) for x in (t.w, t.v, t.u)]
    compare(kernel, lambda update: mx.vjp(update, primals, cotangents))


@pytest.mark.parametrize("argnum", range(5), ids=["lr", *"wgvu"])
def test_grad_of_each_input(kernel: str, argnum: int) -> None:
    inputs = make_tensors((5, 7))
    weights = make_tensors((5, 7), seed=1)

    def gradient(update: Function) -> mx.array:
        def loss(*xs: mx.array) -> mx.array:
            w, v, u = update(*xs)
            return (weights.w * w + weights.v * v + weights.u * u).sum()

        return mx.grad(loss, argnums=argnum)(LR, *inputs)

    [new] = compare(kernel, gradient)
    assert np.abs(new).max() > 0


def test_grad_where_the_update_is_evaluated(kernel: str) -> None:
    """Someone prints a result within the function that is differentiated."""
    inputs = make_tensors((5, 7))

    def loss(w: mx.array, evaluate: bool) -> mx.array:
        # Nobody else holds these inputs.
        new = make_update(kernel)(LR, *(x + 0 for x in (w, *inputs[1:])))
        if evaluate:
            mx.eval(new)
        return sum((x * x).sum() for x in new)

    new, expected = (mx.grad(loss)(inputs.w, evaluate) for evaluate in (True, False))
    assert_all_close([new], [expected])
    assert np.abs(expected).max() > 0


def test_vmap_of_grad(native: str) -> None:
    def gradients(update: Function) -> mx.array:
        gradient = mx.grad(lambda *xs: sum(x.sum() for x in update(LR, *xs)), 1)
        return mx.vmap(gradient)(*make_tensors((3, 5)))

    compare(native, gradients)


# --------------------------------- Compilation --------------------------------


def test_compile(kernel: str) -> None:
    inputs = [LR, *flat(make_tensors((33, 65)), make_tensors((3,), seed=1))]
    compiled = mx.compile(make_update(kernel))
    assert_same_trees("cpu", compiled(*inputs), make_update(kernel)(*inputs))


def test_equal_updates_are_merged_and_others_are_not(native: str) -> None:
    """mx.compile asks the primitive which of its nodes are equivalent."""
    tensors = make_tensors((5, 7))

    def updates(lr: mx.array, *xs: mx.array) -> list[mx.array]:
        parameters = [(0.9, 1e-6), (0.9, 1e-6), (0.8, 1e-6), (0.9, 1e-3)]
        new = [
            x
            for rho, eps in parameters
            for x in adadelta_update(*xs, lr, rho, eps, backend=native)
        ]
        return [mx.exp(x) for x in new]  # what is returned itself is not merged

    new = mx.compile(updates)(LR, *tensors)
    assert graph(*new).count("AdaDeltaUpdate") == 3
    assert_same_trees("cpu", new, updates(LR, *tensors))


def test_shapeless_compile(native: str) -> None:
    compiled = mx.compile(make_update(native), shapeless=True)
    for n in (3, 65, 1):
        inputs = [LR, *flat(make_tensors((n, 5)), make_tensors((2, n, 3)))]
        assert_same_trees("cpu", compiled(*inputs), make_update(native)(*inputs))


def test_a_step_is_exported_with_backend_mlx(tmp_path: Path, backend: str) -> None:
    """MLX serializes its own operations alone."""
    w, g, v, u = make_tensors((4, 3))

    def step(w: mx.array, g: mx.array, v: mx.array, u: mx.array) -> Any:
        return adadelta_update(w, g, v, u, 0.5, backend=backend)

    file = str(tmp_path / "step.mlxfn")
    if backend != "mlx":
        with pytest.raises(ValueError, match="Unable to serialize primitive"):
            mx.export_function(file, step, w, g, v, u)
        return
    mx.export_function(file, step, w, g, v, u)
    new = mx.import_function(file)(w, g, v, u)
    assert_same_trees("cpu", new, step(w, g, v, u))
