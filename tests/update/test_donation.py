"""Memory is reused where nobody else can see it, and nowhere else."""

import gc
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arrays import address, evaluate, make_tensors, to_float64
from mlx.utils import tree_flatten
from tables import FLOAT32, Types

from mlx_adadelta import AdaDelta, adadelta_update

HALF = Types(*[mx.float16] * 4)
LAYOUTS = {
    "same": ["same"] * 4,
    "all transposed": ["transposed"] * 4,
    "transposed gradient": ["same", "transposed", "same", "same"],
}


def addresses(*arrays: mx.array) -> list[int]:
    return [address(x) for x in arrays]


@pytest.mark.parametrize("types", [FLOAT32, HALF], ids=str)
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 33, 65), (700, 300)], ids=str)
def test_results_take_their_inputs_memory(
    native: str, shape: tuple[int, ...], layouts: list[str], types: Types
) -> None:
    w, g, v, u = make_tensors(shape, types, layouts)
    before = addresses(w, v, u)
    g_before = to_float64(g)
    for _ in range(3):
        w, v, u = adadelta_update(w, g, v, u, 1.0, backend=native)
        evaluate(w, v, u)
        assert addresses(w, v, u) == before
    np.testing.assert_array_equal(to_float64(g), g_before)


@pytest.mark.parametrize("held", "wvu")
def test_a_held_array_keeps_its_values_and_memory(native: str, held: str) -> None:
    tensors = make_tensors((65, 33))
    keep = getattr(tensors, held)
    values, where = to_float64(keep), address(keep)
    before = {name: address(getattr(tensors, name)) for name in "wvu"}
    w, g, v, u = tensors
    del tensors
    w, v, u = adadelta_update(w, g, v, u, 1.0, backend=native)
    evaluate(w, v, u)
    assert address(keep) == where
    np.testing.assert_array_equal(to_float64(keep), values)
    for name, x in {"w": w, "v": v, "u": u}.items():
        assert (address(x) == before[name]) == (name != held)


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w[2:],
        lambda w: w.T,
        lambda w: w.reshape(-1),
        lambda w: np.array(w, copy=False),
        memoryview,
    ],
    ids=["slice", "transpose", "reshape", "numpy", "memoryview"],
)
def test_a_held_view_keeps_its_values(
    backend: str, view: Callable[[mx.array], Any]
) -> None:
    w, g, v, u = make_tensors((65, 33))
    held = view(w)
    if isinstance(held, mx.array):
        evaluate(held)
    values = np.array(held, copy=True)
    w, v, u = adadelta_update(w, g, v, u, 1.0, backend=backend)
    evaluate(w, v, u)
    np.testing.assert_array_equal(np.array(held), values)


def test_a_slice_does_not_keep_a_large_buffer(native: str) -> None:
    large = mx.zeros((1 << 20,))
    evaluate(large)
    where = address(large)
    w = large[:100]
    evaluate(w)
    del large
    _, g, v, u = make_tensors((100,))
    resident = mx.get_active_memory()
    w, v, u = adadelta_update(w, g, v, u, 1.0, backend=native)
    evaluate(w, v, u)
    assert address(w) != where
    assert mx.get_active_memory() < resident - 4_000_000


def test_empty_arrays_take_no_memory(native: str) -> None:
    tensors = make_tensors((1 << 20, 0))
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    evaluate(adadelta_update(*tensors, 1.0, backend=native))
    assert mx.get_peak_memory() - resident <= 16384


@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
def test_an_update_allocates_nothing(native: str, layouts: list[str]) -> None:
    w, g, v, u = make_tensors((1031, 523), layouts=layouts)
    lr = mx.array(1.0)
    evaluate(lr)
    gc.collect()  # or what earlier tests left goes meanwhile
    mx.reset_peak_memory()
    resident = mx.get_active_memory()
    w, v, u = adadelta_update(w, g, v, u, lr, backend=native)
    evaluate(w, v, u)
    assert mx.get_peak_memory() <= resident
    assert mx.get_active_memory() == resident


def test_only_what_is_held_is_allocated(native: str) -> None:
    w, g, v, u = held = make_tensors((1031, 523))
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    w, v, u = adadelta_update(w, g, v, u, 1.0, backend=native)
    evaluate(w, v, u)
    # Three results beside what is there, and nothing temporary but the rate.
    assert mx.get_peak_memory() - resident <= 3 * held.w.nbytes + 3 * 16384


def test_training_in_place(native: str) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.relu, nn.Linear(48, 32))
    optimizer = AdaDelta(1.0, backend=native)
    optimizer.init(model.trainable_parameters())
    evaluate(model, optimizer.state)

    def tree_addresses() -> dict[str, int]:
        state = {k: v for k, v in optimizer.state.items() if k == "layers"}
        trees = [model.parameters(), state]
        return {path: address(x) for tree in trees for path, x in tree_flatten(tree)}

    before = tree_addresses()
    assert len(before) == 12
    loss = nn.value_and_grad(model, lambda x: model(x).square().mean())
    for _ in range(3):
        _, gradients = loss(mx.random.normal((16, 64)))
        evaluate(gradients)
        optimizer.update(model, gradients)
        evaluate(model, optimizer.state)
        assert tree_addresses() == before
