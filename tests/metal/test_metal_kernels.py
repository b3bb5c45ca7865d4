"""The kernels of adadelta.metal, run on the host under sanitizers.

Every entry point runs over a table of sizes on buffers of exactly their size:
with AddressSanitizer and UndefinedBehaviorSanitizer, a*b+c contracted and not,
denormals kept and flushed, and with ThreadSanitizer and an OS thread a lane. Each
result is held against float64. See host_metal/driver.py.
"""

import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from host_metal.driver import (
    ELEMENTS_PER_THREAD,
    ITEMSIZE,
    TILE_BYTES,
    TILE_STRIDE,
    TILE_THREADS,
    TYPES,
    VARIANTS,
    Memory,
    decode,
    encode,
    make_sparse,
    random_bits,
    request,
    run,
)
from numpy.lib.stride_tricks import as_strided
from reference import Float64, adadelta_step

from mlx_adadelta import adadelta_update

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac runs the kernels on its GPU"
)

THREADS = 256
OFFSET = 4  # bytes of arrays that are slices
SIZES = [0, 1, 3, 31, 32, 33, 1023, 1024, 1025, 100003]
# Batch, rows, columns, and the gap after each column of the gradient.
MATRICES = [
    (1, 1, 1, 0),
    (1, 1, 70, 0),
    (1, 70, 1, 0),
    (1, 31, 33, 0),
    (1, 64, 64, 0),
    (1, 257, 129, 0),
    (3, 31, 33, 0),
    (2, 64, 64, 0),
    (2, 33, 65, 5),
]
RHO, EPS, LEARNING_RATE, SCALE = 0.9, 1e-6, 0.5, 2.0
MODES = ["nearest", "stochastic", "skip"]
SEED, TENSOR, STEP = (1, 2), 3, 4  # of stochastic rounding
LARGEST = 100.0

# The longest chain, u, has some 16 float32 roundings; then it is stored.
FLOAT32_ERROR = 16 * 2.0**-24
ROUNDOFF = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Below the normal numbers roundoff is absolute, half the smallest denormal;
# flushed, it is the smallest normal, and in g it grows by sqrt(u / eps).
DENORMAL = {"float32": 2.0**-149, "float16": 2.0**-25, "bfloat16": 2.0**-134}
FLUSHED = 2.0**-126 * (LARGEST / EPS) ** 0.5


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Float64:
    """Numbers of dtype, most near one, some tiny or denormal, a few NaN."""
    x = rng.uniform(0.01, 2.0, shape)
    rare = rng.random(shape)
    tiny = 10.0 ** rng.uniform(-45, np.log10(LARGEST), shape)
    x = np.where(rare < 0.2, tiny, x)
    x[rare < 0.01] = np.nan
    return decode(encode(x, dtype), dtype).reshape(shape)


@dataclass
class Case:
    """A launch, and what w, v and u should become."""

    name: str
    request: bytes
    inputs: list[Float64]  # w, g, v and u
    expected: list[Float64]
    mode: str


def values(mode: str) -> list[bytes]:
    """The buffers of one value, and the parameters."""
    return [
        struct.pack("=f", LEARNING_RATE),
        struct.pack("=f", SCALE),
        struct.pack("=?", mode == "skip"),
        struct.pack("=Q", STEP),
        struct.pack(
            "=6f4I",
            *(RHO, 1 - RHO, EPS, -1, 0, 0),
            *(mode == "stochastic", *SEED, TENSOR),
        ),
    ]


def make_case(
    kernel: str,
    types: tuple[str, str, str],
    launch: tuple[Sequence[int], int, int],  # grid, threads, threadgroup's bytes
    g: Float64,  # element for element beside w
    g_memory: Float64,  # as it lies in memory
    size: bytes,  # the last buffer
    in_place: bool,
    mode: str,
    offset: int = 0,
) -> Case:
    rng = np.random.default_rng(g.size)
    w = random(rng, g.shape, types[0]) * rng.choice([-1, 1], g.shape)
    v = random(rng, g.shape, types[2])
    u = random(rng, g.shape, types[2])
    arrays = zip((w, g_memory, v, u), (*types, types[2]), strict=True)
    inputs = [encode(x, dtype) for x, dtype in arrays]
    outputs = [i if in_place else b"\xff" * len(inputs[i]) for i in (0, 2, 3)]
    new: Sequence[Float64] = w, v, u
    if mode != "skip":
        new = adadelta_step(
            *(w, g, v, u, LEARNING_RATE, RHO, EPS), maximize=True, gradient_scale=SCALE
        )
    name = f"adadelta_{kernel}_{'_'.join(types)}"
    return Case(
        f"{name}, {launch}, {mode}",
        request(name, *launch, [*inputs, *outputs, *values(mode), size], offset),
        [w, g, v, u],
        [*new],
        mode,
    )


def linear_launch(n: int) -> tuple[Sequence[int], int, int]:
    groups = max(1, -(-n // (THREADS * ELEMENTS_PER_THREAD)))
    return (groups, 1, 1), THREADS, 0


def linear_case(types: tuple[str, str, str], n: int, in_place: bool, mode: str) -> Case:
    offset = OFFSET * (in_place != (n % 2 == 0))  # each with each
    rng = np.random.default_rng(1)
    g = random(rng, (n,), types[1]) * rng.choice([-1, 1], n)
    return make_case(
        *("linear", types, linear_launch(n), g, g, struct.pack("=Q", n)),
        *(in_place, mode, offset),
    )


def tiled_launch(
    types: tuple[str, str, str], shape: tuple[int, ...]
) -> tuple[Sequence[int], int, int]:
    batch, rows, columns = shape
    w, g, state = (ITEMSIZE[name] for name in types)
    tile_rows, tile_columns = TILE_BYTES // g, TILE_BYTES // min(w, state)
    grid = -(-columns // tile_columns), -(-rows // tile_rows), batch
    return grid, TILE_THREADS, tile_columns * TILE_STRIDE


def tiled_case(
    types: tuple[str, str, str],
    matrix: tuple[int, int, int, int],
    in_place: bool,
    mode: str,
) -> Case:
    batch, rows, columns, gap = matrix
    rng = np.random.default_rng(1)
    padded = random(rng, (batch, columns, rows + gap), types[1])
    padded[..., rows:] = np.nan  # must not be read
    return make_case(
        *("tiled", types, tiled_launch(types, matrix[:3])),
        padded[..., :rows].swapaxes(1, 2),
        padded.reshape(-1)[: padded.size - gap],
        struct.pack("=qqII", columns * (rows + gap), rows + gap, rows, columns),
        *(in_place, mode),
    )


FAMILIES: dict[str, tuple[Callable[..., Case], Sequence[Any]]] = {
    "linear": (linear_case, SIZES),
    "tiled": (tiled_case, MATRICES),
}


@pytest.mark.parametrize("types", TYPES, ids="_".join)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel(variant: str, family: str, types: tuple[str, str, str]) -> None:
    make, table = FAMILIES[family]
    cases = [
        make(types, size, in_place, mode)
        for in_place in (False, True)
        for i, size in enumerate(table)
        # One variant runs every mode at every size, the others take turns.
        for mode in (MODES if variant == "asan" else [MODES[(i + in_place) % 3]])
    ]
    results = run(variant, [case.request for case in cases])
    for case in cases:
        for name, dtype, expected in zip(
            "wvu", (types[0], types[2], types[2]), case.expected, strict=True
        ):
            end = expected.size * ITEMSIZE[dtype]
            got = decode(results[:end], dtype).reshape(expected.shape)
            results = results[end:]
            absolute = FLUSHED * ("flushed" in variant) + 4 * DENORMAL[dtype]
            # Up or down at random is as much as twice to the nearest.
            roundoff = ROUNDOFF[dtype] * (2 if case.mode == "stochastic" else 1)
            w = case.inputs[0]
            scale = abs(w) + abs(expected - w) if name == "w" else expected
            bound = (roundoff + FLOAT32_ERROR) * scale + absolute
            if case.mode == "skip":
                bound = np.zeros_like(bound)
            where = f"{name} of {case.name}"
            np.testing.assert_array_equal(np.isnan(got), np.isnan(expected), where)
            wrong = np.argwhere(abs(got - expected) > bound)
            assert not len(wrong), (
                f"{where}: {len(wrong)} elements differ, first {wrong[0]}: "
                f"{got[tuple(wrong[0])]} for {expected[tuple(wrong[0])]}"
            )
    assert not results


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_bits_are_those_of_the_plain_operations(
    family: str, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "LARGEST", 1e4)  # float16 overflows
    make, table = FAMILIES[family]
    case = make((half, half, half), table[-2], False, "stochastic")
    dtype = getattr(mx, half)
    inputs = [mx.array(x.astype(np.float32)).astype(dtype) for x in case.inputs]
    new = adadelta_update(
        *([x] * (TENSOR + 1) for x in inputs),  # the last is the tensor
        *(LEARNING_RATE, RHO, EPS),
        maximize=True,
        gradient_scale=SCALE,
        stochastic_rounding=True,
        seed=SEED[0] + (SEED[1] << 32),
        step=STEP,
        backend="mlx",
    )
    results = decode(run("asan", [case.request]), half).reshape(3, *inputs[0].shape)
    for got, expected in zip(results, new, strict=True):
        last = np.array(expected[TENSOR].astype(mx.float32))
        np.testing.assert_array_equal(got, last)


# ------------------------------- Beyond 32 bits -------------------------------

FAR_TYPES = ("bfloat16",) * 3
SIDE = TILE_BYTES // 2  # of its tile


def run_ends(
    kernel: str, launch: tuple[Sequence[int], int, int], wgvu: list[Memory], size: bytes
) -> None:
    """Updates in place, with stochastic rounding, what the first threadgroup and the
    last one hold."""
    name = f"adadelta_{kernel}_{'_'.join(FAR_TYPES)}"
    buffers = [*wgvu, 0, 2, 3, *values("stochastic"), size]
    assert run("asan", [request(name, *launch, buffers, most_groups=1)]) == b""


def run_linear(wgvu: list[Memory], n: int) -> None:
    run_ends("linear", linear_launch(n), wgvu, struct.pack("=Q", n))


def run_tiled(wgvu: list[Memory], batch_stride: int, column_stride: int) -> None:
    shape = wgvu[0].shape
    tile = struct.pack("=qqII", batch_stride, column_stride, *shape[1:])
    run_ends("tiled", tiled_launch(FAR_TYPES, shape), wgvu, tile)


def test_linear_index_beyond_32_bits(tmp_path: Path) -> None:
    """Threads, elements and random bits beyond 2^32, where the first threadgroup has
    the same numbers as the last."""
    size = THREADS * ELEMENTS_PER_THREAD
    far = 2**32 * ELEMENTS_PER_THREAD  # the first thread beyond 2^32
    arrays = make_sparse(tmp_path, *[(far + size,)] * 4)
    for i, x in enumerate(arrays):
        x[:size] = x[far:] = random_bits((size,), i)
    run_linear(arrays, far + size)
    for i in (0, 2, 3):
        blocks = random_bits((size,), i), arrays[i][:size], arrays[i][far:]
        before, first, last = (decode(x.tobytes(), "bfloat16") for x in blocks)
        assert (first != before).mean() > 0.5
        assert (last != before).mean() > 0.5
        # Rounded by other bits, to the same number or its neighbour.
        assert 0.05 < (first != last).mean() < 0.95
        np.testing.assert_allclose(first, last, rtol=2 * ROUNDOFF["bfloat16"] * 2)


def test_gradient_with_strides_beyond_31_bits(tmp_path: Path) -> None:
    batch, rows, columns = shape = 2, 5, SIDE + 2  # two tiles

    def update(batch_stride: int, column_stride: int) -> list[Memory]:
        last = (batch - 1) * batch_stride + (columns - 1) * column_stride + rows
        w, g, v, u = wgvu = make_sparse(tmp_path, shape, (last,), shape, shape)
        for i, x in enumerate((w, v, u)):
            x[:] = random_bits(shape, i)
        strides = (2 * batch_stride, 2, 2 * column_stride)
        as_strided(g, shape, strides)[:] = random_bits(shape, 3)
        run_tiled(wgvu, batch_stride, column_stride)
        return [w, v, u]

    near = update(columns * rows, rows)
    assert (near[0] != random_bits(shape, 0)).any()
    np.testing.assert_array_equal(update(2**38, 2**31 + 8), near)


def test_tile_of_a_parameter_beyond_32_bits(tmp_path: Path) -> None:
    """Two places are the linear kernel's, too: the end, and the first run of four
    elements with 2^32 among them."""
    batch, rows, columns = shape = 2, 6, 2**31 - 1
    turned = batch, columns, rows
    tiled = make_sparse(tmp_path, shape, turned, shape, shape)
    linear = make_sparse(tmp_path, *[shape] * 4)
    end = columns % SIDE  # columns of the last tile
    for i, (x, y) in enumerate(zip(tiled, linear, strict=True)):
        by_rows = x.swapaxes(1, 2) if i == 1 else x
        for part in (np.s_[..., :SIDE], np.s_[..., -end:]):
            by_rows[part] = y[part] = random_bits(y[part].shape, i)
    run_tiled(tiled, rows * columns, rows)
    middle = 2 * columns + SIDE  # where a row's first tile ends
    for n in (batch * rows * columns, middle):
        run_linear(linear, n)
    for i in (0, 2, 3):
        x, y = tiled[i].reshape(-1), linear[i].reshape(-1)
        for part in (np.s_[-end:], np.s_[2**32 : middle]):
            np.testing.assert_array_equal(x[part], y[part])
        old = random_bits((batch, rows, end), i)
        assert (x[-end:] != old[-1, -1]).any()
