"""What the kernels ask of a GPU, counted in LLVM's code.

clang compiles the shipped file, as C++ for OpenCL, for another maker's GPU: nobody
else's compiler takes it for Apple's. What is counted here the source decides, and
not the target: loads and stores, vectors, 64-bit arithmetic and branches.
"""

import functools
import re
import sys
from collections import Counter

import pytest
from host_metal import build
from host_metal.driver import ITEMSIZE, TILE_BYTES, TILE_THREADS, TYPES

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac has the real compiler"
)

OPTIONS = [
    *["--target=nvptx64", "-Xclang", "-target-cpu", "-Xclang", "sm_90"],
    *["-O2", "-fno-vectorize", "-fno-slp-vectorize", "-Wno-everything"],
    *["-mllvm", "-inline-threshold=1000000"],  # a GPU has no calls
    *["-S", "-emit-llvm", "-o", "-"],
]
FUNCTION = re.compile(r"^define [^\n]*@_Z\d+(adadelta_\w+?)PU3AS.*?^\}", re.M | re.S)
MEMORY = r"(load|store) (<4 x \w+>|\w+),? [^\n]*?addrspace\(%d\)"
NAMES = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
RUN = 4  # elements side by side
FAMILIES = ["linear", "tiled"]
# Reads of lr, gradient scale, skip and the step.
SCALARS = 4
# Branches on skip, on stochastic, and on whether all elements are there.
DECISIONS = 3
KEYS = 20  # products of 32 bits, for the random bits' keys


@functools.cache
def compiled(elements: int = 4) -> dict[str, str]:
    """The kernels' code by name, with so many elements a thread."""
    text = build.metal_source("adadelta.metal")
    text, count = re.subn(r"(kElementsPerThread = )4", rf"\g<1>{elements}", text)
    assert count == 1
    code = build.run([*build.clang(), *build.OPENCL, *OPTIONS, "-"], text)
    return {match[1]: match[0] for match in FUNCTION.finditer(code)}


def kernel(family: str, types: tuple[str, str, str], elements: int = 4) -> str:
    return compiled(elements)[f"adadelta_{family}_{'_'.join(types)}"]


def memory(code: str, space: int = 1) -> Counter[tuple[str, str]]:
    """Loads and stores of each type in an address space: 1 device, 3 threadgroup."""
    return Counter(re.findall(MEMORY % space, code))


def runs(family: str, types: tuple[str, str, str], elements: int = 4) -> int:
    """Of a thread: in a tile of cache lines along the gradient and the parameter."""
    if family == "linear":
        return elements // RUN
    w, g, state = (ITEMSIZE[name] for name in types)
    tile = TILE_BYTES // g * (TILE_BYTES // min(w, state))
    return tile // (TILE_THREADS * RUN)


def wide(code: str) -> Counter[str]:
    """64-bit arithmetic."""
    return Counter(re.findall(r" = (add|sub|mul|[us]div|[us]rem)\b[^\n]* i64 ", code))


def rounds(types: tuple[str, str, str]) -> bool:
    return types[0] != "float32" or types[2] != "float32"


@pytest.mark.parametrize("types", TYPES, ids="_".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_element_moves_once_in_vectors(
    family: str, types: tuple[str, str, str]
) -> None:
    """Four elements by one instruction, all reads before all writes. Beside that the
    path where not all elements are there, one by one."""
    code, n = kernel(family, types), runs(family, types)
    w, g, state = (NAMES[name] for name in types)
    counted = memory(code)
    read, written = Counter([w, g, state, state]), Counter([w, state, state])
    for name in NAMES.values():
        vector = f"<4 x {name}>"
        assert counted["load", vector] == n * read[name], name
        assert counted["store", vector] == n * written[name], name
        singles = SCALARS * (name == "float") + n * RUN * read[name]
        assert counted["load", name] <= singles, name
        assert counted["store", name] <= n * RUN * written[name], name
    reads, writes = (
        [match.start() for match in re.finditer(MEMORY % 1, code) if match[1] == kind]
        for kind in ("load", "store")
    )
    assert max(reads) < min(writes)
    staged = n * RUN * (family == "tiled")
    assert memory(code, 3) == Counter({("load", g): staged, ("store", g): staged})


@pytest.mark.parametrize("types", TYPES, ids="_".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_branch_between_reads_and_writes(
    family: str, types: tuple[str, str, str]
) -> None:
    """But the decisions of a thread, however many elements it has."""
    for elements in (4, 8):
        code = kernel(family, types, elements)
        moves = list(re.finditer(MEMORY % 1, code))
        first = next(match for match in moves if match[1] == "store").start()
        last = [match.end() for match in moves if match[1] == "load"][-1]
        assert len(re.findall(r"\bbr i1|\bswitch", code[last:first])) <= DECISIONS


@pytest.mark.parametrize("types", TYPES, ids="_".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_64_bits_once_a_thread(family: str, types: tuple[str, str, str]) -> None:
    """Products are formed once, whatever the elements; a run is a sum away."""
    most = 1 if family == "linear" else 5
    for elements in (4, 8):
        counted = wide(kernel(family, types, elements))
        assert counted.pop("mul") <= most + KEYS * rounds(types)
        n = runs(family, types, elements)
        assert counted.pop("add") + counted.pop("sub", 0) <= 2 * n + 4
        assert not counted  # no division
