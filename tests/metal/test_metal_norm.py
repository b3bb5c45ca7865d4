"""The kernels of norm.metal, run on the host under sanitizers, against float64."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from host_metal.driver import (
    ITEMSIZE,
    VARIANTS,
    decode,
    encode,
    make_sparse,
    random_bits,
    request,
    run,
)
from reference import Float64

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac runs the kernels on its GPU"
)

# Must match metal/norm.metal.
ELEMENTS = 16  # of a thread
HIGH, LOW = 2.0**-80, 2.0**20  # the scales of the two sums

THREADS = 256
FIRST = 3  # the place of the first threadgroup's sums
SIZES = [1, 3, 4, 255, 256, 257, 4095, 4096, 4097, 3 * 4096, 50001]
UNWRITTEN = struct.pack("=f", np.nan)


def sums_request(
    dtype: str, x: Float64, threads: int = THREADS, offset: int = 0
) -> bytes:
    groups = -(-x.size // (threads * ELEMENTS))
    buffers = [encode(x, dtype), UNWRITTEN * 2 * (FIRST + groups)]
    buffers += [struct.pack("=Q", x.size), struct.pack("=I", FIRST)]
    name = f"norm_sums_{dtype}"
    return request(name, (groups, 1, 1), threads, 8 * threads, buffers, offset)


def total_request(sums: Float64, threads: int = THREADS) -> bytes:
    buffers = [encode(sums, "float32"), UNWRITTEN * 2]
    buffers.append(struct.pack("=I", sums.size // 2))
    return request("norm_total", (1, 1, 1), threads, 8 * threads, buffers)


def values(dtype: str, size: int) -> Float64:
    rng = np.random.default_rng(size)
    largest = 1e4 if dtype == "float16" else 1e30
    scale = [1.0, 1e-4 if dtype == "float16" else 1e-15, largest][size % 3]
    x = rng.uniform(0.1, 1.0, size) * scale
    return decode(encode(x, dtype), dtype)


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sums(variant: str, dtype: str) -> None:
    arrays = [values(dtype, size) for size in SIZES]
    requests = [sums_request(dtype, x, offset=4 * (x.size % 2)) for x in arrays]
    results = run(variant, requests)
    for x in arrays:
        part = THREADS * ELEMENTS
        groups = -(-x.size // part)
        sums = decode(results[: 8 * (FIRST + groups)], "float32").reshape(-1, 2)
        results = results[8 * (FIRST + groups) :]
        assert np.isnan(sums[:FIRST]).all()  # another gradient's
        for i, (high, low) in enumerate(sums[FIRST:]):
            squares = np.square(x[i * part : (i + 1) * part])
            # One of the two is exact, the one that norm_total takes.
            if np.isinf(low) or low > 2.0**100:
                np.testing.assert_allclose(high, (squares * HIGH**2).sum(), 1e-6)
            else:
                np.testing.assert_allclose(low, (squares * LOW**2).sum(), 1e-6)
    assert not results


@pytest.mark.parametrize("variant", VARIANTS)
def test_total(variant: str) -> None:
    rng = np.random.default_rng(0)
    many = rng.uniform(0, 1, 100003)  # more than a float adds up one by one
    tables = [
        np.stack([squares * HIGH**2, squares * LOW**2], axis=1)
        for squares in (np.ones(1), many[:255], many[:256], many[:257], many)
    ]
    tables[-1][:, 1] *= 2.0**20
    requests = [total_request(table.reshape(-1)) for table in tables]
    results = decode(run(variant, requests), "float32").reshape(-1, 2)
    for (norm, bad), table in zip(results, tables, strict=True):
        low = decode(encode(table[:, 1], "float32"), "float32")
        np.testing.assert_allclose(norm, np.sqrt(low.sum()) / LOW, 1e-6)
        assert bad == 0


@pytest.mark.parametrize(
    ("sums", "norm", "bad"),
    [
        ([[0, 0], [0, 0]], 0, 0),
        ([[4 * HIGH, np.inf], [0, 1]], 2 / HIGH**0.5, 0),
        ([[2.0**100, np.inf]] * 3, np.inf, 0),
        ([[np.inf, np.inf], [1, 1]], np.inf, 1),
        ([[1, 1], [np.nan, np.nan], [np.inf, np.inf]], np.nan, 1),
        ([[HIGH, 3e38], [HIGH, 3e38]], 2**0.5 / HIGH**0.5, 0),
    ],
)
def test_total_beyond_the_numbers(
    sums: list[list[float]], norm: float, bad: int
) -> None:
    asked = total_request(np.array(sums, np.float64).reshape(-1))
    got, flag = decode(run("asan", [asked]), "float32")
    np.testing.assert_allclose(got, norm, 1e-6)
    assert flag == bad


def test_many_equal_sums() -> None:
    """A float that adds them one by one rounds each the same way."""
    sums = np.full(2 * 10**6, 0.1)
    norm, bad = decode(run("asan", [total_request(sums)]), "float32")
    np.testing.assert_allclose(norm, np.sqrt(10**6 * np.float32(0.1)) / LOW, 1e-7)
    assert bad == 0


def test_index_beyond_32_bits(tmp_path: Path) -> None:
    part = THREADS * ELEMENTS
    far = 2**32
    groups = far // part + 1
    [x] = make_sparse(tmp_path, (far + part,))
    x[:part], x[far:] = random_bits((part,), 0), random_bits((part,), 1)
    rest = [UNWRITTEN * 2 * groups, struct.pack("=Q", x.size), struct.pack("=I", 0)]
    asked = request(
        "norm_sums_bfloat16",
        *((groups, 1, 1), THREADS, 8 * THREADS, [x, *rest]),
        most_groups=1,
    )
    sums = decode(run("asan", [asked]), "float32")
    for got, content in ((sums[1], x[:part]), (sums[-1], x[far:])):
        expected = np.square(decode(content.tobytes(), "bfloat16") * LOW).sum()
        np.testing.assert_allclose(got, expected, 1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3, 32, 96, 1024])
def test_any_number_of_threads(threads: int) -> None:
    x = values("float32", 5000)
    sums = decode(run("asan", [sums_request("float32", x, threads)]), "float32")
    total = run("asan", [total_request(sums[2 * FIRST :], threads)])
    norm, bad = decode(total, "float32")
    np.testing.assert_allclose(norm, np.sqrt(np.square(x).sum()), 1e-6)
    assert bad == 0
