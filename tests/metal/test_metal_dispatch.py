"""What csrc/eval_metal.cpp tells Metal, as the mock below it sees it.

Whatever is wrong about a dispatch the mock refuses in every test that runs on the
backend "host-metal" (host_metal/mock_metal.cpp). Here is what would be right, but
not as it should be.
"""

import hashlib
import io
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from arrays import Tensors, make_tensors
from checks import stock_step
from host_metal import build
from host_metal.backend import Mock, load, load_from
from reference import adadelta_step
from tables import NATIVE_OPTIONS, TOLERANCE

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac has the real Metal"
)

LR, RHO, EPS = 0.5, 0.9, 1e-6
BYTES = 28  # of an element in float32: w, g, v, u read; w, v, u written
SCALAR_BYTES = 4 + 4 + 1 + 8  # lr, gradient scale, skip, step


@pytest.fixture
def mock() -> Iterator[Mock]:
    mock = Mock(load())
    yield mock
    mock.max_threads.value = 1024


def update(tensors: Sequence[Tensors]) -> list[tuple[mx.array, ...]]:
    """One step over the Metal path; the new w, v and u of each."""
    columns = [list(column) for column in zip(*tensors, strict=True)]
    new = load().adadelta_update(*columns, mx.array(LR), **NATIVE_OPTIONS)
    mx.eval(new)
    return list(zip(*new, strict=True))


def check(tensors: Tensors, new: tuple[mx.array, ...]) -> None:
    expected = adadelta_step(*map(np.array, tensors), LR, RHO, EPS)
    for got, want in zip(new, expected, strict=True):
        np.testing.assert_allclose(np.array(got), want, *TOLERANCE[mx.float32])


def test_library_is_the_shipped_source_and_named_after_it(mock: Mock) -> None:
    shipped = build.metal_source("adadelta.metal") + build.metal_source("norm.metal")
    digest = hashlib.sha256(shipped.encode()).hexdigest()
    mock.start_record()
    update([make_tensors((3,))])
    assert mock.end_record()[0] == ["library", f"mlx_adadelta_{digest}", "compiled"]
    assert mock.source() == shipped


@pytest.mark.parametrize(
    ("place", "found"),
    [("above/beside", True), ("above", True), (".", False), ("current", False)],
)
def test_library_near_the_extension_alone_is_loaded(
    tmp_path: Path, place: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = load().__file__
    assert file is not None
    for folder in (tmp_path / "above/beside", tmp_path / "current"):
        folder.mkdir(parents=True)
    copy = shutil.copy(file, tmp_path / "above/beside")
    library = tmp_path / place / "mlx_adadelta.metallib"
    library.touch()
    monkeypatch.chdir(tmp_path / "current")
    for name in ("DYLD_LIBRARY_PATH", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    native = load_from(Path(copy))
    mock = Mock(native)
    mock.start_record()
    w, g, v, u = make_tensors((3,))
    mx.eval(native.adadelta_update([w], [g], [v], [u], mx.array(LR), **NATIVE_OPTIONS))
    event, _, where = mock.end_record()[0]
    assert (event, where) == ("library", str(library) if found else "compiled")


@pytest.mark.parametrize(
    ("shape", "layout", "family"),
    [
        ((1025,), "same", "linear"),
        ((33, 65), "same", "linear"),
        ((33, 65), "transposed", "tiled"),
        ((3, 33, 65), "transposed", "tiled"),
        ((1, 65), "transposed", "linear"),
        ((33, 65), "strided", "linear"),
    ],
)
def test_one_dispatch_moves_each_byte_once(
    mock: Mock, shape: tuple[int, ...], layout: str, family: str
) -> None:
    tensors = make_tensors(shape, layouts=("same", layout, "same", "same"))
    mock.start_record()
    update([tensors])
    kernel = f"adadelta_{family}_float32_float32_float32"
    size = BYTES * tensors.w.size + SCALAR_BYTES
    assert mock.end_record()[1:] == [["dispatch", kernel, str(size)]]


def test_parameters_are_updated_side_by_side(mock: Mock) -> None:
    tensors = [make_tensors((n, 5)) for n in range(1, 20)]
    mock.start_record()
    update(tensors)
    events = [event for event, *_ in mock.end_record()]
    assert events.count("dispatch") == len(tensors)
    assert events.count("barrier") == 0


def test_a_norm_waits_once(mock: Mock) -> None:
    gradients = [make_tensors((400 * n, 5)).g for n in range(1, 20)]
    gradients[7] = make_tensors((33, 65), layouts=("transposed",) * 4).g
    mock.start_record()
    norm = load().norm(gradients, stream=mx.cpu)
    mx.eval(norm)
    events = [event[:2] for event in mock.end_record() if event[0] != "library"]
    sums = [["dispatch", "norm_sums_float32"]] * len(gradients)
    assert events == [*sums, ["barrier"], ["dispatch", "norm_total"]]
    expected = np.sqrt(sum(np.square(np.array(g)).sum() for g in gradients))
    np.testing.assert_allclose(norm.item(), expected, 1e-6)


def test_steps_wait_for_each_other(mock: Mock) -> None:
    w, g, v, u = make_tensors((5,))
    mock.start_record()
    for _ in range(3):
        (w,), (v,), (u,) = load().adadelta_update(
            [w], [g], [v], [u], mx.array(LR), **NATIVE_OPTIONS
        )
    mx.eval(w, v, u)
    assert [event for event, *_ in mock.end_record() if event != "library"] == [
        "dispatch",
        *["barrier", "dispatch"] * 2,
    ]


def test_small_threadgroups(mock: Mock) -> None:
    mock.max_threads.value = 96
    linear = make_tensors((1025,))
    check(linear, update([linear])[0])
    norm = load().norm([linear.g], stream=mx.cpu).item()
    np.testing.assert_allclose(norm, np.linalg.norm(np.array(linear.g)), 1e-6)


def test_threadgroups_too_small_for_a_tile(mock: Mock) -> None:
    tensors = [
        make_tensors((64, 64)),
        make_tensors((33, 65), layouts=("same", "transposed", "same", "same")),
    ]
    mock.max_threads.value = 96
    mock.start_record()
    with pytest.raises(RuntimeError, match="too few threads"):
        update(tensors)
    assert [event for event, *_ in mock.end_record()] == ["library", "library"]
    mock.max_threads.value = 1024
    for before, new in zip(tensors, update(tensors), strict=True):
        check(before, new)


# ------------------------------- Stock's counts -------------------------------

# Primitives that move no memory.
VIEWS = {"Broadcast", "ExpandDims", "Flatten", "Reshape", "Squeeze", "Transpose"}
VIEWS |= {"Slice", "Split", "Unflatten"}


def graph_of_stock(compiled: bool) -> str:
    """The graph of stock's update of one matrix, as DOT."""
    tensors = make_tensors((3, 3))

    def step(*wgvu: mx.array) -> tuple[mx.array, ...]:
        return stock_step(Tensors(*wgvu))

    new = (mx.compile(step) if compiled else step)(*tensors)
    text = io.StringIO()
    named = {f"in_{name}": x for name, x in tensors._asdict().items()}
    mx.export_to_dot(text, *new, **named)
    return text.getvalue()


def count_graph(graph: str) -> tuple[int, int, int]:
    """Kernels, passes over the parameter, and kernels in the longest chain."""
    names = dict(re.findall(r'(\d+) \[label ="([^"]+)"', graph))
    reads = set(re.findall(r'^"(\w+)" -> (\d+)$', graph, re.M))
    writers = {
        array: node for node, array in re.findall(r'^(\d+) -> "(\w+)"$', graph, re.M)
    }
    kernels = {node for node, name in names.items() if name not in VIEWS}
    # The other leaves are scalars, and what is broadcast is one.
    large = {array for array, node in writers.items() if node in kernels}
    large |= {f"in_{name}" for name in "wgvu"}
    inputs = sum(array in large and node in kernels for array, node in reads)
    outputs = sum(node in kernels for node in writers.values())

    def depth(node: str) -> int:
        below = [writers[a] for a, reader in reads if reader == node and a in writers]
        return (node in kernels) + max(map(depth, below), default=0)

    return len(kernels), inputs + outputs, max(map(depth, kernels))


@pytest.mark.parametrize(
    ("compiled", "counts"), [(False, (16, 37, 10)), (True, (3, 11, 2))]
)
def test_counts_of_stock(compiled: bool, counts: tuple[int, int, int]) -> None:
    """docs/metal.md has them in a table."""
    assert count_graph(graph_of_stock(compiled)) == counts
