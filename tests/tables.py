"""The tables behind the tests: types, tolerances, shapes and layouts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_adadelta.options import Options

# ----------------------------------- Types ------------------------------------


class Types(NamedTuple):
    """The types of a parameter, its gradient and its state."""

    w: mx.Dtype
    g: mx.Dtype
    v: mx.Dtype
    u: mx.Dtype

    def __str__(self) -> str:
        return "-".join(str(dtype).rpartition(".")[-1] for dtype in self)


FLOAT32 = Types(*[mx.float32] * 4)
HALVES = (mx.float16, mx.bfloat16)

DTYPES = (
    FLOAT32,
    Types(mx.float32, mx.float16, mx.float32, mx.float32),
    Types(mx.float32, mx.bfloat16, mx.float32, mx.float32),
    *(
        types
        for half in HALVES
        for types in (
            Types(half, half, half, half),
            Types(half, half, mx.float32, mx.float32),
            Types(half, mx.float32, half, half),
            Types(half, mx.float32, mx.float32, mx.float32),
        )
    ),
    # No kernel has these types: they go through float32.
    Types(mx.float32, mx.float32, mx.float16, mx.float16),
    Types(mx.float32, mx.bfloat16, mx.bfloat16, mx.bfloat16),
    Types(mx.float16, mx.bfloat16, mx.float16, mx.float16),
    Types(mx.bfloat16, mx.bfloat16, mx.float16, mx.float16),
    Types(mx.float16, mx.float16, mx.float32, mx.float16),
    Types(mx.bfloat16, mx.float32, mx.bfloat16, mx.float32),
)

# --------------------------------- Tolerances ---------------------------------


class Tolerance(NamedTuple):
    """How far a step may take a result of order 1 from float64's."""

    rtol: float
    atol: float


# A step rounds each result to its type once, by 2^-p at most where p is the
# precision in bits; as much again is left for what earlier steps rounded off.
# float32 and float64 also round within the step: some eight operations deep.
TOLERANCE = {
    mx.float64: Tolerance(2**-50, 2**-50),
    mx.float32: Tolerance(2**-21, 2**-21),
    mx.float16: Tolerance(2**-10, 2**-10),
    mx.bfloat16: Tolerance(2**-7, 2**-7),
}

# ----------------------------------- Shapes -----------------------------------

# Around what the kernels count in: 4 elements a thread, 1024 a threadgroup,
# 2^16 a unit of work, 2^17 for a second thread.
VECTORS = tuple(
    (n,)
    for n in (
        *(0, 1, 2, 3, 4, 5, 7, 31, 32, 33, 7919),
        *(1023, 1024, 1025, 65535, 65536, 65537, 131071, 131072, 131073, 300007),
    )
)
# Around a tile's side on a GPU, 32, and a strip's rows on the CPU, 32 and 64.
MATRICES = (
    *((1, 1), (1, 7), (7, 1), (2, 3), (31, 33), (32, 32), (64, 64), (65, 63)),
    *((33, 1), (1, 65), (257, 129), (5, 1031), (523, 521)),
)
SHAPES = (
    (),
    *VECTORS,
    *MATRICES,
    *((0, 3), (3, 0), (2, 0, 5)),
    *((1, 1, 1), (3, 31, 33), (5, 64, 64), (2, 1, 3, 1), (2, 3, 5, 7, 11)),
)

# ---------------------------------- Layouts -----------------------------------


def permuted(x: mx.array, order: tuple[int, ...]) -> mx.array:
    """x with its axes in this order in memory, outermost first."""
    back = sorted(range(x.ndim), key=lambda axis: order[axis])
    return mx.contiguous(x.transpose(*order)).transpose(*back)


def _transposed(x: mx.array) -> mx.array:
    return mx.contiguous(x.swapaxes(-1, -2)).swapaxes(-1, -2) if x.ndim > 1 else x


def _padded(x: mx.array) -> mx.array:
    return mx.pad(x, [(1, 2)] * x.ndim)[(slice(1, -2),) * x.ndim]


def _padded_transposed(x: mx.array) -> mx.array:
    return _padded(x.swapaxes(-1, -2)).swapaxes(-1, -2) if x.ndim > 1 else _padded(x)


def _strided(x: mx.array) -> mx.array:
    return mx.repeat(x, 2, -1)[..., ::2] if x.ndim else x


def _broadcast(x: mx.array) -> mx.array:
    return mx.broadcast_to(mx.contiguous(x[..., :1]), x.shape) if x.ndim else x


def _reversed(x: mx.array) -> mx.array:
    return mx.contiguous(x[..., ::-1])[..., ::-1] if x.ndim else x


# Each returns an array of the same shape and values that lies as it is called;
# "broadcast" repeats the first column, so its values are to be read back.
LAYOUTS: dict[str, Callable[[mx.array], mx.array]] = {
    "same": lambda x: x,
    # A matrix's gradient; in three dimensions a batch of transposed matrices.
    "transposed": _transposed,
    "column-contiguous": lambda x: permuted(x, tuple(reversed(range(x.ndim)))),
    "first axis innermost": lambda x: permuted(x, (*range(1, x.ndim), 0)[: x.ndim]),
    # In three dimensions one transposed matrix, its rows the first two axes.
    "last axis outermost": lambda x: permuted(
        x, (*range(x.ndim)[-1:], *range(x.ndim - 1))
    ),
    "sliced": _padded,
    "sliced transposed": _padded_transposed,
    "strided": _strided,
    "broadcast": _broadcast,
    "reversed": _reversed,
}
# Without gaps or repetitions: results can lie so too.
DENSE = (
    *["same", "transposed", "column-contiguous"],
    *["first axis innermost", "last axis outermost"],
)

# What the native extension takes after the arrays, with nothing switched on.
NATIVE_OPTIONS: dict[str, Any] = {
    "options": Options(),
    "path": "[{}]".format,
    "decays": [],
    "step": None,
    "gradient_scale": None,
    "skip": None,
    "stream": mx.cpu,
}
