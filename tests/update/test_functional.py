"""The numbers: every output, over types, shapes, hyper-parameters and groups."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from arrays import Tensors, graph, make_tensors, to_float64
from checks import (
    assert_same_bits,
    assert_same_but_nans,
    assert_same_trees,
    check_update,
    is_exact,
    stock_step,
)
from reference import adadelta_step
from tables import DTYPES, SHAPES, Types

from mlx_adadelta import adadelta_update
from mlx_adadelta.options import MLX_RELEASE


@pytest.mark.parametrize("types", DTYPES, ids=str)
def test_types(backend: str, types: Types) -> None:
    shapes = [(1,), (3,), (4,), (5,), (1025,), (33, 65), (3, 5, 7)]
    check_update(backend, [make_tensors(shape, types) for shape in shapes], steps=12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    check_update(backend, [make_tensors(shape)], steps=12)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_number_that_is_zero_in_float32(backend: str, name: str) -> None:
    tensors = make_tensors((100,))
    tiny, zero = (
        adadelta_update(*tensors, **{"learning_rate": 1.0, name: x}, backend=backend)
        for x in (1e-46, 0.0)
    )
    assert_same_trees("cpu", tiny, zero)


def test_hyper_parameters_from_numpy(backend: str) -> None:
    tensors = make_tensors((100,))
    numbers = (0.5, 0.75, 2**-20)
    numpy = (np.float64(0.5), np.float32(0.75), np.float32(2**-20))
    new = adadelta_update(*tensors, *numpy, backend=backend)
    expected = adadelta_update(*tensors, *numbers, backend=backend)
    assert_same_trees("cpu", new, expected)


@pytest.mark.skipif(
    MLX_RELEASE < (0, 32, 1),
    reason="older MLX rounds float64 numbers to float32",
)
def test_float64_on_the_cpu() -> None:
    with mx.stream(mx.cpu):
        tensors = make_tensors((5, 7), Types(*[mx.float64] * 4))
        check_update("mlx", [tensors], steps=12)
        for x in adadelta_update(*tensors, 1.0):
            assert x.dtype == mx.float64  # "auto" finds the one that can


def test_a_float64_gradient_on_the_cpu() -> None:
    types = Types(mx.float32, mx.float64, mx.float32, mx.float32)
    with mx.stream(mx.cpu):
        tensors = make_tensors((5, 7), types)
        for backend in ("cpu", "mlx"):
            check_update(backend, [tensors], steps=3)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 9, 33])
def test_lists(backend: str, count: int) -> None:
    # Differing shapes and types: a mix-up within a group or between two shows.
    tensors = [
        make_tensors((i + 1, 7 * i + 3), DTYPES[i % len(DTYPES)], seed=i)
        for i in range(count)
    ]
    check_update(backend, tensors, steps=2)


def test_many_threads_in_one_group(backend: str) -> None:
    shapes = [(3,), (131073,), (), (70000,), (0,), (521, 523), (65536,)]
    layouts = ("same", "transposed", "same", "same")
    tensors = [make_tensors(s, layouts=layouts, seed=i) for i, s in enumerate(shapes)]
    check_update(backend, tensors, steps=2)


def test_special_values(backend: str) -> None:
    """Infinities, NaN, zeros of both signs and overflow spread as in stock."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, 1e-20, 1.0]
    grid = np.array(np.meshgrid(*[special] * 4), np.float32).reshape(4, -1)
    tensors = Tensors(*map(mx.array, grid))
    new = adadelta_update(*tensors, 1.0, backend=backend)
    for x, expected in zip(new, stock_step(tensors, 1.0), strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(expected))
        if is_exact(backend):
            assert_same_but_nans(x, expected)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32])
def test_learning_rate_arrays(backend: str, dtype: mx.Dtype) -> None:
    tensors = make_tensors((10,))
    by_array = adadelta_update(*tensors, mx.array(2, dtype), backend=backend)
    by_number = adadelta_update(*tensors, 2, backend=backend)
    assert_same_trees("cpu", by_array, by_number)


def test_lazy_inputs_and_asynchronous_evaluation(backend: str) -> None:
    tensors = make_tensors((64, 64))
    w, v, u = stock_step(tensors)
    expected = stock_step(Tensors(w, tensors.g * 2, v, u))
    w, g, v, u = tensors
    w, v, u = adadelta_update(w, g, v, u, 0.75, backend=backend)
    new = adadelta_update(w, g * 2, v, u, 0.75, backend=backend)
    mx.async_eval(new)
    for x, y in zip(new, expected, strict=True):
        np.testing.assert_allclose(x, y, 1e-5)
        if is_exact(backend):
            assert_same_bits(x, y)


@pytest.mark.parametrize("kept", range(3), ids="wvu")
def test_one_output_alone(backend: str, kept: int) -> None:
    tensors = make_tensors((33, 65))
    expected = stock_step(tensors)[kept]
    x = adadelta_update(*tensors, 0.75, backend=backend)[kept]
    del tensors
    np.testing.assert_allclose(x, expected, 1e-5, 1e-6)


def test_any_stream_of_the_device(backend: str) -> None:
    device = mx.default_device()
    tensors = make_tensors((100,))
    expected = adadelta_update(*tensors, 1.0, backend=backend)
    streams = [device, device.type, mx.new_stream(device)]
    if MLX_RELEASE >= (0, 32, 0):
        streams.append(mx.new_thread_local_stream(device))
    for stream in streams:
        new = adadelta_update(*tensors, 1.0, backend=backend, stream=stream)
        assert_same_trees("cpu", new, expected)


@pytest.mark.skipif(
    MLX_RELEASE < (0, 32, 0), reason="before MLX 0.32.0 streams belong to no thread"
)
def test_the_stream_asked_for_is_used(backend: str) -> None:
    """Seen by MLX's refusal to run what belongs to another thread's stream."""
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(mx.new_stream, mx.default_device()).result()
    new = adadelta_update(*make_tensors((5,)), 1.0, backend=backend, stream=stream)
    with pytest.raises(RuntimeError, match=r"no Stream\(.+\) in current thread"):
        mx.eval(new)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("rho", [0.9, 0.99])
def test_sixteen_bits_err_no_more_than_stock(
    backend: str, dtype: mx.Dtype, rho: float
) -> None:
    steps = 50
    tensors = make_tensors((1000,), Types(*[dtype] * 4))
    gradients = [
        make_tensors((1000,), Types(*[dtype] * 4), seed=i).g for i in range(steps)
    ]
    w, _, v, u = ours = stock = tensors
    exact = [to_float64(x) for x in (w, v, u)]
    errors = {"ours": np.zeros(3), "stock": np.zeros(3)}
    for g in gradients:
        w, v, u = adadelta_update(*ours._replace(g=g), 1.0, rho, backend=backend)
        ours = Tensors(w, g, v, u)
        w, v, u = stock_step(stock._replace(g=g), 1.0, rho)
        stock = Tensors(w, g, v, u)
        w, v, u = exact
        exact = adadelta_step(w, to_float64(g), v, u, 1.0, rho, 1e-6)
        for name, x in {"ours": ours, "stock": stock}.items():
            for i, y in enumerate((x.w, x.v, x.u)):
                errors[name][i] += np.sum((to_float64(y) - exact[i]) ** 2)
    w, v, u = np.sqrt(errors["ours"] / errors["stock"])
    assert max(v, u) < 1
    assert w < 1.1  # both round w itself once a step, which is most of its error


@pytest.mark.parametrize("chosen", ["auto", "native", "mlx"])
def test_a_kernel_is_one_node_of_the_graph(native: str, chosen: str) -> None:
    backend = native if chosen == "native" else chosen
    nodes = graph(*adadelta_update(*make_tensors((3,)), 1.0, backend=backend))
    assert nodes.count("AdaDeltaUpdate") == (chosen != "mlx")
    assert ("Sqrt" in nodes) == (chosen == "mlx")
