"""The kernels of adadelta.metal, run on the host under sanitizers.

Every entry point runs over a table of sizes on buffers of exactly their size:
with AddressSanitizer and UndefinedBehaviorSanitizer, a*b+c contracted and not,
denormals kept and flushed, and with ThreadSanitizer and an OS thread a lane. Each
result is held against float64. See host_metal/driver.cpp.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from host_metal import build
from reference import Float64, adadelta_step

from mlx_adadelta import adadelta_update

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac runs the kernels on its GPU"
)

# Must match metal/update.h.
ELEMENTS_PER_THREAD = 4
TILE_BYTES = 128  # of a tile's row, without its padding
TILE_STRIDE = TILE_BYTES + 4
TILE_THREADS = 256
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}

THREADS = 256
ALL_GROUPS = 2**40
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
TYPES = re.findall(
    r"\bX\((\w+), (\w+), (\w+)\)",
    (build.ROOT / "metal/adadelta_step.h").read_text(),
)

# Drivers (host_metal/build.py) and their options.
VARIANTS = {
    "asan": ["asan/driver"],
    "asan-contracted": ["asan-contracted/driver"],
    "asan-flushed": ["asan/driver", "--flush"],
    "tsan": ["tsan/driver", "--threads"],
}

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


def encode(x: Float64, dtype: str) -> bytes:
    """x rounded to dtype."""
    if dtype != "bfloat16":
        return x.astype(dtype).tobytes()
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def decode(data: bytes, dtype: str) -> Float64:
    if dtype != "bfloat16":
        return np.frombuffer(data, dtype).astype(np.float64)
    bits = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64)


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
    """One launch: what the driver reads, and what w, v and u should become."""

    text: str
    data: bytes
    inputs: list[Float64]  # w, g, v and u
    expected: list[Float64]
    scale: list[Float64]  # what roundoff is relative to
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
    launch: list[int],  # grid, threads, bytes of threadgroup memory
    g: Float64,  # element for element beside w
    g_memory: Float64,  # as it lies in memory
    sizes: list[bytes],  # the last buffers
    in_place: bool,
    mode: str,
    aligned: bool = True,
) -> Case:
    rng = np.random.default_rng(g.size)
    w = random(rng, g.shape, types[0]) * rng.choice([-1, 1], g.shape)
    v = random(rng, g.shape, types[2])
    u = random(rng, g.shape, types[2])
    inputs = [
        encode(w, types[0]),
        encode(g_memory, types[1]),
        encode(v, types[2]),
        encode(u, types[2]),
    ]
    buffers: list[bytes | int] = [*inputs]
    for i in (0, 2, 3):
        buffers.append(-i - 1 if in_place else b"\xff" * len(inputs[i]))
    buffers += [*values(mode), *sizes]

    new_w, new_v, new_u = w, v, u
    if mode != "skip":
        new_w, new_v, new_u = adadelta_step(
            *(w, g, v, u, LEARNING_RATE, RHO, EPS), maximize=True, gradient_scale=SCALE
        )
    launch = [*launch, 0 if aligned else OFFSET, ALL_GROUPS, len(buffers)]
    text = f"{kernel}_{'_'.join(types)} {' '.join(map(str, launch))}"
    return Case(
        text,
        b"".join(
            b"%d\n" % b if isinstance(b, int) else b"%d\n%b" % (len(b), b)
            for b in buffers
        ),
        [w, g, v, u],
        [new_w, new_v, new_u],
        [abs(w) + abs(new_w - w), new_v, new_u],
        mode,
    )


def linear_case(types: tuple[str, str, str], n: int, in_place: bool, mode: str) -> Case:
    groups = max(1, -(-n // (THREADS * ELEMENTS_PER_THREAD)))
    aligned = in_place == (n % 2 == 0)  # each with each
    rng = np.random.default_rng(1)
    g = random(rng, (n,), types[1]) * rng.choice([-1, 1], n)
    return make_case(
        "adadelta_linear",
        types,
        [groups, 1, 1, THREADS, 1, 1, 0],
        g,
        g,
        [struct.pack("=Q", n)],
        in_place,
        mode,
        aligned,
    )


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
    w, beside_g, state = (ITEMSIZE[name] for name in types)
    tile_rows, tile_columns = TILE_BYTES // beside_g, TILE_BYTES // min(w, state)
    return make_case(
        "adadelta_tiled",
        types,
        [
            *[-(-columns // tile_columns), -(-rows // tile_rows), batch],
            *[TILE_THREADS, 1, 1],
            tile_columns * TILE_STRIDE,
        ],
        padded[..., :rows].swapaxes(1, 2),
        padded.reshape(-1)[: padded.size - gap],
        [struct.pack("=qqII", columns * (rows + gap), rows + gap, rows, columns)],
        in_place,
        mode,
    )


FAMILIES: dict[str, tuple[Callable[..., Case], Sequence[Any]]] = {
    "linear": (linear_case, SIZES),
    "tiled": (tiled_case, MATRICES),
}


def without_aslr() -> list[str]:
    """A prefix for commands: GCC 12's sanitizers fail where addresses are spread as
    wide as newer kernels do. A container may not be allowed to, nor need it.
    """
    command = [shutil.which("setarch") or "false", "-R"]
    allowed = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if allowed.returncode == 0 else []


def run_cases(variant: str, cases: list[Case]) -> bytes:
    driver, *options = VARIANTS[variant]
    build.build(driver)
    done = subprocess.run(
        [*without_aslr(), build.ROOT / build.BUILD / driver, *options],
        input=b"".join(c.text.encode() + b"\n" + c.data for c in cases),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


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
    results = run_cases(variant, cases)
    for case in cases:
        for name, dtype, expected, scale in zip(
            ["w", "v", "u"],
            [types[0], types[2], types[2]],
            case.expected,
            case.scale,
            strict=True,
        ):
            end = expected.size * (4 if dtype == "float32" else 2)
            got = decode(results[:end], dtype).reshape(expected.shape)
            results = results[end:]
            absolute = FLUSHED * ("flushed" in variant) + 4 * DENORMAL[dtype]
            # Up or down at random is as much as twice to the nearest.
            roundoff = ROUNDOFF[dtype] * (2 if case.mode == "stochastic" else 1)
            bound = (roundoff + FLOAT32_ERROR) * scale + absolute
            if case.mode == "skip":
                bound = np.zeros_like(bound)
            where = f"{name} of {case.text}"
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
    results = decode(run_cases("asan", [case]), half).reshape(3, *inputs[0].shape)
    for got, expected in zip(results, new, strict=True):
        last = np.array(expected[TENSOR].astype(mx.float32))
        np.testing.assert_array_equal(got, last)


Windows = list[tuple[int, bytes]]  # place of the first byte, and the bytes


def run_sparse(
    kernel: str,
    launch: list[int],  # grid, threads, bytes of threadgroup memory
    size: int,  # bytes of w, v and u
    arrays: list[Windows],  # w, g, v and u
    sizes: list[bytes],
    g_size: int | None = None,
) -> list[bytes]:
    """Updates in place, with stochastic rounding, arrays that are address space but
    for some windows. Runs the first threadgroup and the last; returns the new w, v
    and u: the windows' bytes."""
    data = b""
    for windows, total in zip(arrays, (size, g_size or size, size, size), strict=True):
        data += b"sparse %d %d\n" % (total, len(windows))
        for place, content in windows:
            data += b"%d %d\n%b" % (place, len(content), content)
    data += b"-1\n-3\n-4\n"
    tail = [*values("stochastic"), *sizes]
    data += b"".join(b"%d\n%b" % (len(b), b) for b in tail)
    text = " ".join(map(str, [kernel, *launch, 0, 1, 7 + len(tail)]))
    results = run_cases("asan", [Case(text, data, [], [], [], "stochastic")])
    lengths = [sum(len(c) for _, c in arrays[i]) for i in (0, 2, 3)]
    ends = np.cumsum(lengths)
    return [results[e - n : e] for e, n in zip(ends, lengths, strict=True)]


def some_bytes(n: int, index: int) -> bytes:
    return encode(np.random.default_rng(index).uniform(0.5, 1.5, n), "bfloat16")


BFLOAT16 = "bfloat16_bfloat16_bfloat16"


def test_linear_index_beyond_32_bits() -> None:
    """Threads, elements and random bits beyond 2^32, where the first threadgroup has
    the same numbers as the last."""
    size = THREADS * ELEMENTS_PER_THREAD
    far = 2**32 * ELEMENTS_PER_THREAD  # the first thread beyond 2^32
    contents = [some_bytes(size, i) for i in range(4)]
    new = run_sparse(
        f"adadelta_linear_{BFLOAT16}",
        [far // size + 1, 1, 1, THREADS, 1, 1, 0],
        2 * (far + size),
        [[(0, c), (2 * far, c)] for c in contents],
        [struct.pack("=Q", far + size)],
    )
    for old, both in zip((contents[0], *contents[2:]), new, strict=True):
        near, beyond = both[: 2 * size], both[2 * size :]
        before, first, last = (decode(x, "bfloat16") for x in (old, near, beyond))
        assert (first != before).mean() > 0.5
        assert (last != before).mean() > 0.5
        # Rounded by other bits, to the same number or its neighbour.
        assert 0.05 < (first != last).mean() < 0.95
        np.testing.assert_allclose(first, last, rtol=2 * ROUNDOFF["bfloat16"] * 2)


def run_tile(
    matrix: tuple[int, int, int],
    strides: tuple[int, int],  # of the gradient's matrices and columns
    arrays: list[Windows],
) -> list[bytes]:
    batch, rows, columns = matrix
    side = TILE_BYTES // 2
    last = (batch - 1) * strides[0] + (columns - 1) * strides[1] + rows
    return run_sparse(
        f"adadelta_tiled_{BFLOAT16}",
        [-(-columns // side), 1, batch, TILE_THREADS, 1, 1, side * TILE_STRIDE],
        2 * batch * rows * columns,
        arrays,
        [struct.pack("=qqII", *strides, rows, columns)],
        2 * last,
    )


def test_gradient_with_strides_beyond_31_bits() -> None:
    matrix = batch, rows, columns = 2, 5, TILE_BYTES // 2 + 2  # two tiles
    w, g, v, u = (some_bytes(batch * rows * columns, i) for i in range(4))

    def run(batch_stride: int, column_stride: int) -> list[bytes]:
        places = [
            2 * (b * batch_stride + c * column_stride)
            for b in range(batch)
            for c in range(columns)
        ]
        spread = [(p, g[10 * i : 10 * i + 10]) for i, p in enumerate(places)]
        arrays: list[Windows] = [[(0, w)], spread, [(0, v)], [(0, u)]]
        return run_tile(matrix, (batch_stride, column_stride), arrays)

    near = run(columns * rows, rows)
    assert near[0] != w
    assert run(2**38, 2**31 + 8) == near


def test_tile_of_a_parameter_beyond_32_bits() -> None:
    """Two places are the linear kernel's, too: the end, and the first run of four
    elements with 2^32 among them."""
    batch, rows, columns, side = 2, 6, 2**31 - 1, TILE_BYTES // 2
    count = columns % side  # columns of the last tile
    lines = range(batch * rows)

    def windows(index: int) -> Windows:
        starts = [(2 * r * columns, some_bytes(side, index + r)) for r in lines]
        ends = [
            (2 * ((r + 1) * columns - count), some_bytes(count, index + r))
            for r in lines
        ]
        return starts + ends

    def turned(blocks: list[bytes]) -> bytes:
        return np.array([np.frombuffer(x, np.uint16) for x in blocks]).T.tobytes()

    w, v, u, beside = (windows(index) for index in (0, 20, 40, 60))
    blocks = [content for _, content in beside]
    n = batch * rows * columns
    g = [
        (0, turned(blocks[:rows])),
        (2 * (n - rows * count), turned(blocks[-rows:])),
    ]
    strides = (rows * columns, rows)
    tiled = run_tile((batch, rows, columns), strides, [w, g, v, u])

    def linear(n: int, block: int, skipped: int) -> list[bytes]:
        """Updates the last elements of n, which are those of a block."""
        size = THREADS * ELEMENTS_PER_THREAD
        arrays: list[Windows] = []
        for array in (w, beside, v, u):
            end = array[block][1][2 * skipped :]
            padding = n % size - len(end) // 2
            place = 2 * (n - n % size)
            arrays.append(
                [(0, some_bytes(size, 0)), (place, some_bytes(padding, 1) + end)]
            )
        launch = [-(-n // size), 1, 1, THREADS, 1, 1, 0]
        new = run_sparse(
            f"adadelta_linear_{BFLOAT16}", launch, 2 * n, arrays, [struct.pack("=Q", n)]
        )
        return [x[-len(end) :] for x in new]

    assert [x[-2 * count :] for x in tiled] == linear(n, -1, 0)
    assert tiled[0][-2 * count :] != w[-1][1]
    row, skipped = 2, 2**32 - 2 * columns
    row_end = 2 * (row + 1) * side
    middle = [x[row_end - 2 * (side - skipped) : row_end] for x in tiled]
    assert middle == linear(row * columns + side, row, skipped)
