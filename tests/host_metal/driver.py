"""Runs kernels of metal/ under sanitizers: what driver.cpp is told and what it says."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from reference import Float64

from . import build

# Must match metal/update.h.
ELEMENTS_PER_THREAD = 4
TILE_BYTES = 128  # of a tile's row, without its padding
TILE_STRIDE = TILE_BYTES + 4
TILE_THREADS = 256
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
TYPES = re.findall(
    r"\bX\((\w+), (\w+), (\w+)\)",
    (build.ROOT / "metal/adadelta_step.h").read_text(),
)

# Drivers (build.py) and their options.
VARIANTS = {
    "asan": ["asan/driver"],
    "asan-contracted": ["asan-contracted/driver"],
    "asan-flushed": ["asan/driver", "--flush"],
    "tsan": ["tsan/driver", "--threads"],
}


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


# The bytes of an array, the number of another one that it shares, or a file.
Buffer: TypeAlias = "bytes | int | np.memmap[Any, Any]"


def request(
    kernel: str,
    grid: Sequence[int],
    threads: int,
    memory: int,  # bytes a threadgroup
    buffers: Sequence[Buffer],
    offset: int = 0,  # bytes of the arrays from an aligned address
    most_groups: int = 2**40,  # threadgroups to run at either end of the grid
) -> bytes:
    """One launch for the driver."""
    launch = [kernel, *grid, threads, memory, offset, most_groups, len(buffers)]
    text = " ".join(map(str, launch)).encode() + b"\n"
    for buffer in buffers:
        if isinstance(buffer, np.memmap):
            text += b"@%b\n" % str(buffer.filename).encode()
        elif isinstance(buffer, int):
            text += b"-%d\n" % (buffer + 1)
        else:
            text += b"%d\n%b" % (len(buffer), buffer)
    return text


def without_aslr() -> list[str]:
    """A prefix for commands: GCC 12's sanitizers fail where addresses are spread as
    wide as newer kernels do. A container may not be allowed to, nor need it.
    """
    command = [shutil.which("setarch") or "false", "-R"]
    allowed = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if allowed.returncode == 0 else []


def run(variant: str, requests: Sequence[bytes]) -> bytes:
    """What the kernels have written, but to files."""
    driver, *options = VARIANTS[variant]
    build.build(driver)
    done = subprocess.run(
        [*without_aslr(), build.ROOT / build.BUILD / driver, *options],
        input=b"".join(requests),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


# ------------------------------- Beyond 32 bits -------------------------------

Memory: TypeAlias = "np.memmap[Any, np.dtype[np.uint16]]"  # of bfloat16


def make_sparse(folder: Path, *shapes: tuple[int, ...]) -> list[Memory]:
    """Arrays of zeros, which take memory only where they are written."""
    names = (folder / f"{len(list(folder.iterdir()))}-{i}" for i in range(len(shapes)))
    return [
        np.memmap(name, np.uint16, "w+", shape=shape)
        for name, shape in zip(names, shapes, strict=True)
    ]


def random_bits(shape: tuple[int, ...], seed: int) -> NDArray[np.uint16]:
    x = np.random.default_rng(seed).uniform(0.5, 1.5, shape)
    return np.frombuffer(encode(x, "bfloat16"), np.uint16).reshape(shape)
