"""How arrays lie in memory: read right whatever they do, results lie as w does."""

from functools import partial
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from arrays import Tensors, make_tensors, strides, to_float64
from checks import check_update
from tables import DENSE, DTYPES, LAYOUTS, SHAPES, Types

from mlx_adadelta import adadelta_update

# Either side of the tiles' sides; with axes of length 1, which lie anywhere.
MATRICES = [(5, 3), (33, 65), (1, 7), (7, 1), (3, 5, 7), (2, 65, 33), (4, 1, 3)]
EMPTY = [s for s in SHAPES if 0 in s]
SMALL = [s for s in SHAPES if 0 < np.prod(s) < 1e5]
LARGE = [(131, 1031), (3, 300, 200)]
OPERANDS = range(4)


def odd_one_out(layout: str, operand: int) -> list[str]:
    return [layout if i == operand else "same" for i in OPERANDS]


def test_layouts_lie_as_they_are_called() -> None:
    x = mx.zeros((4, 3, 2))
    expected = {
        "same": (6, 2, 1),
        "transposed": (6, 1, 3),
        "column-contiguous": (1, 4, 12),
        "first axis innermost": (1, 8, 4),
        "last axis outermost": (3, 1, 12),
        "sliced": (30, 5, 1),
        "sliced transposed": (30, 1, 6),
        "strided": (12, 4, 2),
        "broadcast": (3, 1, 0),
        "reversed": (6, 2, -1),
    }
    assert {name: strides(make(x)) for name, make in LAYOUTS.items()} == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", OPERANDS, ids=Tensors._fields)
def test_one_array_lies_otherwise(backend: str, operand: int, layout: str) -> None:
    layouts = odd_one_out(layout, operand)
    shapes = SMALL + EMPTY + LARGE
    check_update(backend, [make_tensors(s, layouts=layouts) for s in shapes])


@pytest.mark.parametrize("w_layout", LAYOUTS)
def test_every_array_lies_otherwise(backend: str, w_layout: str) -> None:
    few = ("same", "transposed", "first axis innermost", "sliced")
    tensors = [
        make_tensors((3, 5, 7), layouts=(w_layout, *rest))
        for rest in product(few, repeat=3)
    ]
    check_update(backend, tensors)


@pytest.mark.parametrize("turned", ["g", "vu", "gvu"])
@pytest.mark.parametrize("types", DTYPES, ids=str)
def test_transposed_arrays_of_all_types(
    backend: str, types: Types, turned: str
) -> None:
    """The gradient's type says how many rows are turned at a time, for all."""
    layouts = ["transposed" if name in turned else "same" for name in "wgvu"]
    shapes = [(33, 65), (131, 67), (257, 263), (2, 131, 5)]
    tensors = [make_tensors(shape, types, layouts) for shape in shapes]
    check_update(backend, tensors, steps=2)


@pytest.mark.parametrize("w_layout", DENSE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", [1, 2, 3], ids=Tensors._fields[1:])
def test_results_lie_as_w(
    native: str, operand: int, layout: str, w_layout: str
) -> None:
    layouts = [w_layout] * 4
    layouts[operand] = layout
    for shape in MATRICES:
        tensors = make_tensors(shape, layouts=layouts)
        expected = strides(tensors.w)
        new = adadelta_update(*tensors, 1.0, backend=native)
        long = [i for i, n in enumerate(shape) if n > 1]
        for x in new:
            assert [strides(x)[i] for i in long] == [expected[i] for i in long]


@pytest.mark.parametrize("w_layout", [name for name in LAYOUTS if name not in DENSE])
def test_results_of_an_odd_w_are_row_contiguous(native: str, w_layout: str) -> None:
    for layout in ("same", w_layout):
        tensors = make_tensors((3, 5, 7), layouts=(w_layout, *[layout] * 3))
        for x in adadelta_update(*tensors, 1.0, backend=native):
            assert strides(x) == (35, 7, 1)


def test_state_of_the_other_layout_turns_once(native: str) -> None:
    w, g, v, u = make_tensors((33, 65), layouts=["same", *["transposed"] * 3])
    for _ in range(2):
        w, v, u = adadelta_update(w, g, v, u, 1.0, backend=native)
        assert strides(w) == strides(v) == strides(u) == (65, 1)


def test_results_can_be_read_in_any_order(native: str) -> None:
    """Flags and strides of a result must agree, or what follows reads it wrong."""
    others = [make_tensors((3, 5, 7), layouts=[layout] * 4).w for layout in DENSE]
    for w_layout in LAYOUTS:
        tensors = make_tensors((3, 5, 7), layouts=(w_layout, *["same"] * 3))
        expected = adadelta_update(*tensors, 1.0, backend="mlx")
        for x, y in zip(
            adadelta_update(*tensors, 1.0, backend=native), expected, strict=True
        ):
            for read in (
                lambda a: a.reshape(-1),
                lambda a: a.transpose(2, 0, 1) + 0,
                lambda a: mx.exp(a.T),
                lambda a: a[1] @ a[2].T,
                lambda a: mx.contiguous(a, allow_col_major=True).sum(axis=1),
                *(partial(mx.add, other) for other in others),
            ):
                np.testing.assert_allclose(
                    to_float64(read(x)), to_float64(read(y)), 1e-4, 1e-5
                )
