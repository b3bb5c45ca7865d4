"""The norm of gradients, and whether they are finite, read once in any layout."""

import os
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from arrays import graph, to_float64
from processes import run_python

from mlx_adadelta import clip_scale, nonfinite

BLOCK, UNIT = 128, 2**16  # of csrc/cpu/norm.cpp
GROUP = 256 * 16  # elements of a threadgroup on Metal
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Views of an array of shape (6, 7, 33, 40).
VIEWS: dict[str, Callable[[mx.array], mx.array]] = {
    "row-contiguous": lambda x: x,
    "permuted": lambda x: x.transpose(3, 1, 0, 2),
    "reversed": lambda x: x[::-1, :, :, ::-1],
    "outer gaps": lambda x: x[:, ::2],
    "inner gaps": lambda x: x[..., ::3],
    "short runs": lambda x: x[..., 1:4],
    "backwards with gaps": lambda x: x[1:5, ::-2, 5:20, ::-2],
    "repeated inside": lambda x: mx.broadcast_to(x[..., None], (*x.shape, 3)),
    "repeated outside": lambda x: mx.broadcast_to(x[0, 0, 0], (50, 40)),
    "one number": lambda x: mx.broadcast_to(x[0, 0, 0, 0], (50, 40)),
    "scalar": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:0],
}


@pytest.fixture
def chosen(
    backend: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """A backend that "auto" chooses; "mlx" also where its norm is that one's."""
    if backend == "mlx":
        monkeypatch.setenv("MLX_ADADELTA_BACKEND", backend)
    named = request.node.callspec.params["backend"]
    return "mlx" if named.endswith("metal-road") else backend


def normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return mx.array(x).astype(dtype)


def exact_norm(*arrays: mx.array) -> float:
    return float(np.sqrt(sum(np.square(to_float64(x)).sum() for x in arrays)))


def close(backend: str, *arrays: mx.array) -> Any:
    """Their norm, as near as the backend comes to it: MLX's own sum drifts."""
    return pytest.approx(exact_norm(*arrays), rel=1e-3 if backend == "mlx" else 1e-6)


def norm_of(gradients: Any) -> float:
    norm = clip_scale(gradients, 1.0)[1]
    assert (norm.dtype, norm.shape) == (mx.float32, ())
    value: float = norm.item()
    return value


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout(chosen: str, dtype: mx.Dtype, view: str) -> None:
    x = VIEWS[view](normal(6, 7, 33, 40, dtype=dtype))
    mx.eval(x)
    assert norm_of([x]) == close(chosen, x)
    assert not nonfinite([x]).item()


@pytest.mark.parametrize("edge", [BLOCK, GROUP, UNIT])
def test_sizes_around_what_is_read_at_once(chosen: str, edge: int) -> None:
    for n in (1, edge - 1, edge, edge + 1, 3 * edge + 5):
        x = normal(n)
        assert norm_of([x]) == close(chosen, x)


def test_a_group_of_all_kinds(chosen: str) -> None:
    kinds = [VIEWS[name](normal(6, 7, 33, 40)) for name in VIEWS]
    kinds += [normal(n, dtype=DTYPES[n % 3], seed=n) for n in range(100)]
    tree = {"a": kinds[:9], "b": {"c": kinds[9:]}}
    assert norm_of(tree) == close(chosen, *kinds)


def test_no_gradients_at_all(chosen: str) -> None:
    assert norm_of({}) == 0
    assert not nonfinite({}).item()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("view", ["row-contiguous", "permuted", "reversed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_element(chosen: str, dtype: mx.Dtype, view: str, value: float) -> None:
    for place in ((0, 0, 0, 0), (3, 2, 1, 7), (5, 6, 32, 39)):
        x = normal(6, 7, 33, 40)
        x[place] = value
        gradients = [normal(5), VIEWS[view](x.astype(dtype)), normal(7)]
        norm = norm_of(gradients)
        assert np.isnan(norm) if np.isnan(value) else norm == np.inf
        assert nonfinite(gradients).item()
        assert nonfinite(clip_scale(gradients, 1.0)[1]).item()


@pytest.mark.parametrize("size", [1e-18, 1e-12, 1e10, 1e18, 1e30])
def test_squares_that_float32_does_not_hold(native: str, size: float) -> None:
    gradients = [size * normal(1000), size * normal(7, 9, seed=1).T]
    assert norm_of(gradients) == pytest.approx(exact_norm(*gradients), rel=1e-6)
    assert not nonfinite(gradients).item()


def test_a_norm_too_large_for_float32(native: str) -> None:
    gradients = [mx.full((5000,), -3.4e38)]
    assert norm_of(gradients) == np.inf
    assert not nonfinite(gradients).item()


def test_large_and_small_gradients_together(native: str) -> None:
    gradients = [mx.full((5,), 1e30), normal(1000), mx.full((5,), 1e-18)]
    assert norm_of(gradients) == pytest.approx(exact_norm(*gradients), rel=1e-6)


def test_float64_is_left_to_plain_operations(on_the_cpu: None) -> None:
    x = normal(50).astype(mx.float64)
    assert norm_of([x]) == pytest.approx(exact_norm(x), rel=1e-6)
    # Not x * 1e200: MLX before 0.32.1 rounds that number to float32.
    huge = mx.array(np.array(x) * 1e200, mx.float64)
    assert not nonfinite([huge]).item()


# Many equal numbers: whatever rounds them rounds each the same way.
@pytest.mark.parametrize(
    "size", [2**22 + 3, pytest.param(10**8, marks=pytest.mark.long)]
)
def test_many_elements(native: str, size: int) -> None:
    x = mx.full((size,), 0.1)
    mx.eval(x)
    expected = float(np.float32(0.1)) * size**0.5
    assert norm_of([x]) == pytest.approx(expected, rel=1e-6)


# ------------------------------------ Cost ------------------------------------


@pytest.mark.parametrize("view", VIEWS)
def test_no_copy(on_the_cpu: None, view: str) -> None:
    x = VIEWS[view](normal(6, 7, 33, 40))
    mx.eval(x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(clip_scale([x], 1.0)[1])
    assert mx.get_peak_memory() - before < 1024


def test_compiled_together_they_are_one_pass(native: str) -> None:
    def both(x: mx.array, y: mx.array) -> list[mx.array]:
        return [*clip_scale([x, y], 1.0), nonfinite([x, y])]

    x, y = normal(50), normal(6, 7)
    outputs = mx.compile(both)(x, y)
    assert graph(*outputs).count("GradientNorm") == 1
    for got, expected in zip(outputs, both(x, y), strict=True):
        assert got.item() == expected.item()


PROGRAM = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}])
import mlx.core as mx
from mlx_adadelta import clip_scale
mx.random.seed(0)
gradients = [mx.random.normal((n,)) for n in (3000001, 5, 200000)]
gradients.append(mx.random.normal((2000, 700))[:, 1:].T)
print(clip_scale(gradients, 1.0)[1].item().hex())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the cores")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_as_many_threads_as_one_likes() -> None:
    one, two = (run_python("-c", PROGRAM.format(cores=n)).stdout for n in (1, 2))
    assert one == two != ""


# --------------------------------- Transforms ---------------------------------


def norm(x: mx.array, y: mx.array) -> mx.array:
    return clip_scale([x, y], 1.0)[1]


def test_derivatives(chosen: str) -> None:
    x, y = normal(5, 4), normal(3, seed=1)
    gradients = mx.grad(norm, argnums=(0, 1))(x, y)
    for gradient, z in zip(gradients, (x, y), strict=True):
        expected = to_float64(z) / exact_norm(x, y)
        np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-5)
    tangents = normal(5, 4, seed=2), normal(3, seed=3)
    _, [slope] = mx.jvp(norm, (x, y), tangents)
    expected = sum((t * z).sum() for t, z in zip(tangents, (x, y), strict=True))
    assert slope.item() == pytest.approx(expected.item() / exact_norm(x, y), rel=1e-4)
    # Of one argument, and of a flag, which has no slope.
    assert mx.grad(norm)(x, y).shape == x.shape
    _, [slope] = mx.jvp(lambda x: nonfinite([x, y]), (x,), tangents[:1])
    assert slope.item() == 0


def test_vmap(chosen: str) -> None:
    x, y = normal(5, 4), normal(3, 5, seed=1)
    x[2, 1] = np.nan
    norms = mx.vmap(norm, (0, 1))(x, y)
    flags = mx.vmap(lambda x, y: nonfinite([x, y]), (0, 1))(x, y)
    for i in range(5):
        alone = x[i], y[:, i]
        np.testing.assert_allclose(norms[i].item(), exact_norm(*alone), rtol=1e-5)
        assert flags[i].item() == nonfinite(alone).item()
