"""Whether a source is legal Metal, as far as other compilers can tell.

C++ for OpenCL has the address spaces of Metal and most of what Metal forbids
(virtual functions, exceptions, new, double, pointers to functions, static locals).
What it lacks is looked up in the code that comes out, or in the signatures.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import build
from .signatures import Argument, Kernel, parse_kernels

# Metal 3 is C++14, Metal 4 is C++17.
STANDARDS = ("c++14", "c++17")
STRICT = [
    *["-Wall", "-Wextra", "-Wshorten-64-to-32", "-Werror"],
    "-Wno-unknown-attributes",
]
TO_LLVM = ["-O0", "-S", "-emit-llvm", "-o", "-"]
MAX_BUFFERS = 31
FORBIDDEN_WORDS = ("goto", "noexcept", "register", "typeid", "dynamic_cast", "asm")
INPUTS = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
}


def complaints(source: Path) -> list[str]:
    """What is wrong with a Metal source; empty for a good one."""
    text = source.read_bytes()
    if not text.isascii():
        return ["not ASCII: MLX's run-time compiler refuses it"]
    found = [
        f"{word!r} is not Metal"
        for word in FORBIDDEN_WORDS
        if re.search(rf"\b{word}\b", _without_comments(text.decode()))
    ]
    for standard in STANDARDS:
        cpp = ["-x", "c++", f"-std={standard}", "-pedantic-errors", *build.METAL]
        found += _errors([*cpp, *STRICT, str(source), "-fsyntax-only"])
    opencl = [*build.OPENCL, *STRICT, str(source)]
    if errors := _errors([*opencl, "-fsyntax-only"]):
        return found + errors
    found += _check_code(build.run([*build.clang(), *opencl, *TO_LLVM]))
    for kernel in parse_kernels(build.run([*build.clang(), *opencl, "-E", "-P"])):
        found += [f"{kernel.name}: {what}" for what in _check_signature(kernel)]
    return found


def _errors(arguments: list[str]) -> list[str]:
    done = subprocess.run(
        [*build.clang(), *arguments],
        cwd=build.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    if done.returncode != 0 and not errors:
        raise RuntimeError(done.stderr)
    return errors


def _without_comments(text: str) -> str:
    return re.sub(r"//.*|/\*.*?\*/", "", text)


_FUNCTION = re.compile(r'^define .*?@"?([\w$.]+).*?\{$(.*?)^\}', re.M | re.S)


def _check_code(llvm: str) -> Iterator[str]:
    """Looks for recursion, lambdas and calls to what Metal does not have."""
    calls: dict[str, set[str]] = {}
    for name, body in _FUNCTION.findall(llvm):
        calls[name] = set(re.findall(r'\bcall .*?@"?([\w$.]+)', body))
        if name.startswith("_ZZ"):
            yield f"a lambda or a local class: {name}"
    for name in re.findall(r'^declare .*?@"?([\w$.]+)', llvm, re.MULTILINE):
        if not name.startswith(("_ZN5metal", "llvm.")):
            yield f"not a function of Metal: {name}"
    for name, called in calls.items():
        reached: set[str] = set()
        ahead = called
        while ahead:
            reached |= ahead
            ahead = {g for f in ahead for g in calls.get(f, ())} - reached
        if name in reached:
            yield f"recursion: {name}"


def _check_signature(kernel: Kernel) -> Iterator[str]:
    for argument in kernel.arguments:
        if what := _check_argument(argument):
            yield f"{argument.name} {what}"
    places = Counter((a.attribute, a.index) for a in kernel.arguments)
    for (attribute, index), count in places.items():
        if count > 1:
            yield f"{attribute}({index}) is used {count} times"


def _check_argument(a: Argument) -> str | None:
    expected = {"device": "buffer", "constant": "buffer", "threadgroup": "threadgroup"}
    if not a.indirection:
        known = a.attribute in INPUTS and a.index is None
        return None if known else "is neither a buffer nor a known input"
    if a.space not in expected:
        return "has no address space"
    if a.attribute != expected[a.space] or a.index is None:
        return f"has no explicit [[{expected[a.space]}(index)]]"
    if a.index >= MAX_BUFFERS:
        return f"has index {a.index}, the last is {MAX_BUFFERS - 1}"
    return None
