"""Backend "mlx" compiles its operations: where, how often, and with the same bits."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import pytest
from arrays import Tensors, graph, make_tensors
from checks import assert_same_trees
from tables import FLOAT32, LAYOUTS, SHAPES, Types

from mlx_adadelta import AdaDelta, adadelta_update, reference
from mlx_adadelta.options import MLX_RELEASE

pytestmark = [
    pytest.mark.usefixtures("on_the_cpu"),
    pytest.mark.skipif(
        MLX_RELEASE < (0, 32, 3),
        reason="older MLX compiles to wrong results",
    ),
]

FLOAT16 = Types(*[mx.float16] * 4)
MIXED = Types(mx.bfloat16, mx.float32, mx.bfloat16, mx.bfloat16)
ROUNDED = {"stochastic_rounding": True, "seed": 5, "step": 2**33}
# Few: g++ takes half a second for each of their kernels.
CASES: list[tuple[Types, dict[str, Any]]] = [
    (FLOAT32, {"weight_decay": 0.1}),
    (FLOAT32, {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    (FLOAT32, {"gradient_scale": mx.array(0.5), "skip": mx.array(True)}),
    (FLOAT32, {"state_dtype": mx.bfloat16, **ROUNDED}),
    (FLOAT16, {}),
    (FLOAT16, ROUNDED),
    (MIXED, {"state_dtype": mx.float32, "skip": mx.array(False)}),
    (MIXED, ROUNDED),
    (Types(*[mx.float64] * 4), {}),
]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The update in operations that are not compiled."""

    def update(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(reference, "compiles_exactly", lambda device: False)
            return adadelta_update(*args, **options, backend="mlx")

    return update


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The types and shapes for which the formula was traced, each time it was."""
    seen: list[Any] = []
    update_one = reference.update_one

    def count(tensors: Any, *rest: Any) -> Any:
        seen.append((tensors[0].dtype, tensors[0].shape))
        return update_one(tensors, *rest)

    monkeypatch.setattr(reference, "update_one", count)
    monkeypatch.setattr(reference, "compiled", mx.compile(count))
    return seen


def check(plain: Any, tensors: Tensors, **options: Any) -> None:
    given = [list(tensors[:1]) * 2, *([x] * 2 for x in tensors[1:])]
    compiled = adadelta_update(*given, 0.7, 0.95, 1e-5, backend="mlx", **options)
    expected = plain(*given, 0.7, 0.95, 1e-5, **options)
    assert_same_trees("cpu", compiled, expected)


def kernels(outputs: Any) -> list[str]:
    """The names of the primitives of a graph."""
    labels = [line for line in graph(*outputs).splitlines() if "rectangle" in line]
    return [line.split('label ="')[1].split('"')[0] for line in labels]


@pytest.mark.skipif(
    not reference.compiles_exactly(mx.cpu),
    reason="no g++ for mx.compile, or it contracts a*b+c",
)
class TestCompiled:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_no_bit_changes_with_the_shape(self, plain: Any, shape: Any) -> None:
        check(plain, make_tensors(shape))

    @pytest.mark.parametrize(("types", "options"), CASES, ids=str)
    def test_nor_with_types_and_options(
        self, plain: Any, types: Types, options: dict[str, Any]
    ) -> None:
        check(plain, make_tensors((33, 5), types), **options)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("place", range(4), ids="wgvu")
    def test_nor_with_the_layout(self, plain: Any, layout: str, place: int) -> None:
        layouts = ["same"] * 4
        layouts[place] = layout
        check(plain, make_tensors((3, 20, 33), layouts=layouts))

    def test_three_kernels_in_place_of_31_operations(self, plain: Any) -> None:
        w, g, v, u = make_tensors((33, 5))
        compiled = kernels(adadelta_update(w, g, v, u, 0.7, backend="mlx"))
        assert len(compiled) == 3
        assert len(kernels(plain(w, g, v, u, 0.7))) > 20

    def test_traced_once_for_types_shape_and_options(self, traces: list[Any]) -> None:
        """Not anew for a step, a learning rate, a rho, an eps, a decay or a seed."""
        x, y = mx.ones((3, 2)), mx.ones((2,))
        w = {"x": x, "y": y, "again": x}
        optimizer = AdaDelta(lambda step: 1 / (1 + step), backend="mlx")
        for i in range(4):
            optimizer.rho, optimizer.eps = 0.9 - i / 100, 10.0**-i
            optimizer.apply_gradients(w, w, gradient_scale=1.0 + i)
        assert len(traces) == 2
        for i in range(1, 4):
            optimizer.weight_decay = i / 10
            optimizer.apply_gradients(w, w, gradient_scale=1.0)
        assert len(traces) == 4
        half = x.astype(mx.bfloat16)
        for i in range(4):
            options = {"stochastic_rounding": True, "step": i, "seed": i}
            adadelta_update(*[[half] * 3] * 4, 1.0, **options, backend="mlx")
        assert len(traces) == 5

    def test_it_does_not_nest(self, plain: Any) -> None:
        """A user's mx.compile sees the operations and fuses them with its own."""
        t = make_tensors((33, 5))

        def step(update: Any, **options: Any) -> Any:
            def run(*tensors: mx.array) -> Any:
                w, v, u = update(*tensors, 0.7, **options)
                return 2 * w, v, u

            return mx.compile(run)(*t)

        nested, alone = step(adadelta_update, backend="mlx"), step(plain)
        assert kernels(nested) == kernels(alone)
        assert_same_trees("cpu", nested, alone)

    def test_on_another_stream(self, plain: Any) -> None:
        t = make_tensors((40,))
        stream = mx.new_stream(mx.cpu)
        for s in (mx.default_stream(mx.cpu), stream, None):
            new = adadelta_update(*t, 0.7, backend="mlx", stream=s)
            assert_same_trees("cpu", new, plain(*t, 0.7))


def test_another_thread_runs_plain_operations(traces: list[Any], plain: Any) -> None:
    """MLX 0.32.4 may end the process with a thread that called a compiled function."""

    def work() -> list[list[str]]:
        tensors = make_tensors((33, 5))
        return [
            kernels(adadelta_update(*tensors, 0.7, backend="mlx")) for _ in range(2)
        ]

    with ThreadPoolExecutor() as pool:
        graphs = pool.submit(work).result()
    assert len(traces) == 2
    assert not any("Compiled" in name for names in graphs for name in names)


def test_without_a_compiler_the_operations_are_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[Compile::eval_cpu] Failed to compile function")

    monkeypatch.setattr(mx, "compile", lambda *_, **__: fails)
    assert not reference.compiles_exactly.__wrapped__(mx.cpu)


@pytest.mark.parametrize("contracted", [False, True])
def test_a_compiler_that_contracts_is_not_used(
    monkeypatch: pytest.MonkeyPatch, contracted: bool
) -> None:
    def fma(x: mx.array, y: mx.array) -> mx.array:
        with mx.stream(mx.cpu):
            exact = x.astype(mx.float64) * x.astype(mx.float64) - y.astype(mx.float64)
        return exact.astype(mx.float32) if contracted else x * x - y

    monkeypatch.setattr(mx, "compile", lambda function: fma)
    assert reference.compiles_exactly.__wrapped__(mx.cpu) is not contracted
