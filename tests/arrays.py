"""Making arrays, and looking at what MLX does not show: memory and bits."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tables import FLOAT32, LAYOUTS, Types

UNSIGNED = {2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


class Tensors(NamedTuple):
    """A parameter, its gradient and its state."""

    w: mx.array
    g: mx.array
    v: mx.array
    u: mx.array


def make_tensors(
    shape: Sequence[int],
    types: Types = FLOAT32,
    layouts: Sequence[str] = ("same",) * 4,
    seed: int = 0,
) -> Tensors:
    """Evaluated arrays of order 1, in memory as the layouts say."""
    rng = np.random.default_rng(seed)
    values = (
        rng.normal(size=shape),
        rng.normal(size=shape),
        rng.uniform(0.1, 1, size=shape),
        rng.uniform(0.1, 1, size=shape),
    )
    tensors = Tensors(
        *(
            LAYOUTS[layout](mx.array(x.astype(np.float32)).astype(dtype))
            for x, dtype, layout in zip(values, types, layouts, strict=True)
        )
    )
    evaluate(tensors)
    return tensors


def evaluate(*trees: Any) -> None:
    """Evaluates, and waits until the device holds none of the memory any more: on a
    GPU that may be later, and until then no update can take it over."""
    mx.eval(*trees)
    mx.synchronize()


def to_float64(x: mx.array) -> NDArray[np.float64]:
    """The exact values of an array of any real type."""
    if x.dtype == mx.bfloat16:
        x = x.astype(mx.float32)
    return np.array(x).astype(np.float64)


def bits(x: mx.array) -> NDArray[Any]:
    """The elements as unsigned integers."""
    return np.array(x.view(UNSIGNED[x.itemsize]))


def strides(x: mx.array) -> tuple[int, ...]:
    """The strides in memory, in elements."""
    mx.eval(x)
    in_bytes = memoryview(x).strides
    return tuple(stride // x.itemsize for stride in in_bytes)


def graph(*outputs: mx.array) -> str:
    """The graph of lazy arrays as text, which names its primitives."""
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    return text.getvalue()


def address(x: mx.array) -> int:
    """Where the first element lies; holds nothing."""
    mx.eval(x)
    return np.asarray(memoryview(x.view(UNSIGNED[x.itemsize]))).ctypes.data
