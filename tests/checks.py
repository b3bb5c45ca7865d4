"""What a result is held against: float64 NumPy, and stock to the last bit."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
from arrays import Tensors, bits, to_float64
from mlx.utils import tree_flatten
from reference import adadelta_step
from tables import TOLERANCE

import mlx_adadelta

LR, RHO, EPS = 0.75, 0.9, 1e-6
WIDE = ({mx.float32}, {mx.float64})  # the types in which stock's results are right


def is_exact(backend: str) -> bool:
    """Whether float32 results are stock's bit for bit: GPUs contract a*b+c."""
    return backend in ("cpu", "mlx")


def assert_same_bits(actual: mx.array, expected: mx.array, message: str = "") -> None:
    """Equal to the last bit, NaN and the signs of zeros included."""
    assert actual.dtype == expected.dtype, message
    np.testing.assert_array_equal(bits(actual), bits(expected), message)


def assert_same_but_nans(actual: mx.array, expected: mx.array, name: str = "") -> None:
    """Equal to the last bit; NaN in the same places, whatever their bits."""
    assert actual.shape == expected.shape, name
    actual, expected = (
        mx.where(mx.isnan(x), mx.array(mx.nan, x.dtype), x) for x in (actual, expected)
    )
    assert_same_bits(actual, expected, name)


@contextmanager
def unchanged(*trees: Any) -> Iterator[None]:
    """Every array of the trees remains itself and keeps its bits."""
    before = {path: (x, mx.array(x)) for path, x in tree_flatten(list(trees))}
    mx.eval([copy for _, copy in before.values()])
    yield
    after = dict(tree_flatten(list(trees)))
    assert after.keys() == before.keys()
    for path, x in after.items():
        held, copy = before[path]
        assert x is held, path
        assert_same_bits(x, copy, path)


def assert_same_trees(backend: str, actual: Any, expected: Any) -> None:
    """The same paths; the same bits, on a GPU the same within tolerance."""
    actual, expected = dict(tree_flatten(actual)), dict(tree_flatten(expected))
    assert actual.keys() == expected.keys()
    for path in expected:
        if is_exact(backend):
            assert_same_bits(actual[path], expected[path], path)
        else:
            assert actual[path].dtype == expected[path].dtype, path
            np.testing.assert_allclose(
                to_float64(actual[path]), to_float64(expected[path]), 1e-3, 1e-5
            )


def assert_close(
    actual: mx.array,
    expected: np.ndarray,
    types: Iterable[mx.Dtype],
    steps: int = 1,
    message: str = "",
) -> None:
    """Within the tolerance of the coarsest of the types, for each step taken."""
    rtol, atol = max(TOLERANCE[dtype] for dtype in types)
    np.testing.assert_allclose(
        to_float64(actual), expected, rtol * steps, atol * steps, err_msg=message
    )


def stock_step(
    tensors: Tensors, lr: float | mx.array = LR, rho: float = RHO, eps: float = EPS
) -> tuple[mx.array, mx.array, mx.array]:
    """One step of mlx.optimizers.AdaDelta."""
    w, g, v, u = tensors
    state = {"v": v, "u": u}
    w = mlx.optimizers.AdaDelta(lr, rho, eps).apply_single(g, w, state)
    return w, state["v"], state["u"]


def check_update(
    backend: str,
    tensors: Sequence[Tensors],
    steps: int = 1,
    lr: float = LR,
    rho: float = RHO,
    eps: float = EPS,
) -> None:
    """Steps over a list of tensors; checks every output of every step.

    Values are held against float64; where all of a tensor's types are float32
    (or all float64) and the backend computes exactly, also against stock.
    """
    new = tuple([getattr(t, name) for t in tensors] for name in "wvu")
    expected = [tuple(to_float64(x) for x in wvu) for wvu in zip(*new, strict=True)]
    stock = list(tensors)
    for step in range(1, steps + 1):
        ws, vs, us = new
        new = mlx_adadelta.adadelta_update(
            ws, [t.g for t in tensors], vs, us, lr, rho, eps, backend=backend
        )
        mx.eval(new)
        for i, (old, results) in enumerate(
            zip(tensors, zip(*new, strict=True), strict=True)
        ):
            w, v, u = expected[i]
            expected[i] = adadelta_step(w, to_float64(old.g), v, u, lr, rho, eps)
            exact = is_exact(backend) and {x.dtype for x in old} in WIDE
            if exact:
                w, v, u = stock_step(stock[i], lr, rho, eps)
                stock[i] = Tensors(w, old.g, v, u)
            types = old.w.dtype, old.v.dtype, old.u.dtype
            for j, name in enumerate("wvu"):
                message = f"{name} of tensor {i} after {step} steps"
                assert results[j].shape == old.w.shape, message
                assert results[j].dtype == types[j], message
                assert_close(results[j], expected[i][j], types, step, message)
                if exact:
                    assert_same_bits(results[j], getattr(stock[i], name), message)
