"""What csrc/eval_metal.cpp tells Metal, as the mock below it sees it.

Whatever is wrong about a dispatch the mock refuses in every test that runs on the
backend "host-metal" (host_metal/mock_metal.cpp). Here is what would be right, but
not as it should be.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from arrays import Tensors, make_tensors
from host_metal import build
from host_metal.backend import Mock, load, load_from
from host_metal.count import CASES, count_graph, count_ours, graph_of_stock
from reference import adadelta_step
from tables import NATIVE_OPTIONS, TOLERANCE

from bench.cases import all_cases

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
    mock.set_max_threads(1024)


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


def test_library_is_named_after_its_source(mock: Mock) -> None:
    updates, norm, *headers = (build.ROOT / file for file in build.METAL_FILES)
    shipped = updates.read_text() + norm.read_text()
    for header in headers:
        include = f'#include "{header.name}"\n'
        shipped = shipped.replace(include, header.read_text())
    digest = hashlib.sha256(shipped.encode()).hexdigest()
    mock.start_record()
    update([make_tensors((3,))])
    assert mock.end_record()[0] == ["library", f"mlx_adadelta_{digest}", "compiled"]


@pytest.mark.parametrize("place", ["", ".."], ids=["beside", "above"])
def test_library_near_the_extension_is_preferred(tmp_path: Path, place: str) -> None:
    file = load().__file__
    assert file is not None
    folder = tmp_path / "mlx-0.0.1"
    folder.mkdir()
    copy = shutil.copy(file, folder)
    library = (folder / place / "mlx_adadelta.metallib").resolve()
    library.touch()
    native = load_from(Path(copy))
    mock = Mock(native)
    mock.start_record()
    w, g, v, u = make_tensors((3,))
    mx.eval(native.adadelta_update([w], [g], [v], [u], mx.array(LR), **NATIVE_OPTIONS))
    assert mock.end_record()[0][2] == str(library)


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
    mock.set_max_threads(96)
    linear = make_tensors((1025,))
    check(linear, update([linear])[0])
    norm = load().norm([linear.g], stream=mx.cpu).item()
    np.testing.assert_allclose(norm, np.linalg.norm(np.array(linear.g)), 1e-6)


def test_threadgroups_too_small_for_a_tile(mock: Mock) -> None:
    tensors = [
        make_tensors((64, 64)),
        make_tensors((33, 65), layouts=("same", "transposed", "same", "same")),
    ]
    mock.set_max_threads(96)
    mock.start_record()
    with pytest.raises(RuntimeError, match="too few threads"):
        update(tensors)
    assert [event for event, *_ in mock.end_record()] == ["library", "library"]
    mock.set_max_threads(1024)
    for before, new in zip(tensors, update(tensors), strict=True):
        check(before, new)


def test_counts_of_the_documented_table() -> None:
    # (kernels, passes over the parameter, kernels in a row)
    assert count_graph(graph_of_stock(compiled=False)) == (16, 37, 10)
    assert count_graph(graph_of_stock(compiled=True)) == (3, 11, 2)
    for name in CASES:
        tensors = all_cases(quick=False)[name].tensors
        assert count_ours(tensors) == (len(tensors), 0, BYTES), name
