"""What the kernels ask of a GPU, counted in PTX.

clang compiles the shipped file, as C++ for OpenCL, for another maker's GPU: nobody
else's compiler takes it for Apple's. Loads and stores, vectors, 64-bit arithmetic
and branches are the source's, not the target's.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter

import pytest
from host_metal import build

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac has the real compiler"
)

OPTIONS = [
    *["--target=nvptx64", "-Xclang", "-target-cpu", "-Xclang", "sm_90"],
    *["-O2", "-fno-vectorize", "-fno-slp-vectorize", "-Wno-everything"],
    *["-mllvm", "-inline-threshold=1000000"],  # a GPU has no calls
    *["-S", "-o", "-"],
]
FUNCTION = re.compile(r"^\.visible \.func\s+_Z\d+(\w+?)PU3AS.*?^\}", re.M | re.S)
INSTRUCTION = re.compile(
    r"^\s+(?:@%p\d+ )?"
    r"((?:ld|st)\.\w+(?:\.v\d)?|mul\.lo\.s64|mul\.wide|(?:div|rem)\.[su]64|bra)",
    re.MULTILINE,
)
# Reads of w, g, v and u, writes of w, v and u; lr, gradient scale and skip.
READS, WRITES, SCALARS = 4, 3, 3
TYPES = ["float32", "float16", "bfloat16"]


@functools.cache
def compiled(elements: int = 4) -> dict[str, str]:
    """The kernels' PTX by name, with so many elements a thread."""
    header = "metal/adadelta_step.h"
    text = (build.ROOT / header).read_text()
    changed, count = re.subn(r"(kElementsPerThread = )4", rf"\g<1>{elements}", text)
    assert count == 1
    folder = f"{build.BUILD}/count{elements}"
    build.write_if_changed(f"{folder}/adadelta_step.h", changed)
    for name in ("adadelta.metal", "rounding.h"):
        content = (build.ROOT / "metal" / name).read_text()
        build.write_if_changed(f"{folder}/{name}", content)
    source = f"{folder}/adadelta.metal"
    ptx = build.run([*build.clang(), *build.OPENCL, *OPTIONS, source])
    return {match[1]: match[0] for match in FUNCTION.finditer(ptx)}


def count(ptx: str) -> Counter[str]:
    return Counter(INSTRUCTION.findall(ptx))


def kernel(family: str, dtype: str) -> str:
    return f"adadelta_{family}_{dtype}_{dtype}_{dtype}"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["linear", "tiled"])
def test_everything_is_read_before_anything_is_written(family: str, dtype: str) -> None:
    ptx = compiled()[kernel(family, dtype)]
    assert ptx.rindex("ld.global") < ptx.index("st.global")


@pytest.mark.parametrize("dtype", TYPES)
def test_linear_moves_vectors(dtype: str) -> None:
    """Four elements by one instruction; beside it the path for what is not aligned."""
    for n in (4, 8):
        counted = count(compiled(n)[kernel("linear", dtype)])
        assert counted["ld.global.v4"] == READS * n // 4
        assert counted["st.global.v4"] == WRITES * n // 4
        scalars = SCALARS + (dtype != "float32")  # the step, for random bits
        assert counted["ld.global"] <= READS * n + scalars
        assert counted["st.global"] <= WRITES * n


@pytest.mark.parametrize(("dtype", "n"), [("float32", 4), ("bfloat16", 16)])
def test_tiled_moves_each_element_once(dtype: str, n: int) -> None:
    """Twice in the code: in a tile that is whole, and in one that is not."""
    counted = count(compiled()[kernel("tiled", dtype)])
    assert counted["ld.shared"] == counted["st.shared"] == n
    scalars = SCALARS + (dtype != "float32")
    assert counted["ld.global"] <= 2 * READS * n + scalars
    assert counted["st.global"] <= 2 * WRITES * n


def test_elements_cost_no_64_bit_arithmetic_and_no_branch() -> None:
    """Twice the elements a thread make nothing more but the bound checks of the path
    where not every element is inside."""
    four, eight = (count(compiled(n)[kernel("linear", "float32")]) for n in (4, 8))
    for slow in ("mul.lo.s64", "mul.wide", "div.u64", "rem.u64", "div.s64", "rem.s64"):
        assert four[slow] == eight[slow] <= 1, slow
    assert eight["bra"] - four["bra"] == 4 * (READS + WRITES)
    assert eight["ld.const"] == four["ld.const"]
