"""Whether a source is legal Metal, as far as other compilers can tell.

C++ for OpenCL has the address spaces of Metal and most of what Metal forbids
(virtual functions, exceptions, new, double, pointers to functions, static locals).
What it lacks is looked up in the code that comes out, or in the signatures.
"""

import re
import subprocess
from collections.abc import Iterator

from . import build
from .rules import broken

# Metal 3 is C++14, Metal 4 is C++17.
STANDARDS = ("c++14", "c++17")
STRICT = [
    *["-Wall", "-Wextra", "-Wshorten-64-to-32", "-Werror"],
    # The shim's `constant` is const, and MLX says both.
    *["-Wno-unknown-attributes", "-Wno-duplicate-decl-specifier"],
    "-Wno-unused-const-variable",  # the headers' numbers are other kernels', too
]
TO_LLVM = ["-O0", "-S", "-emit-llvm", "-o", "-"]


def complaints(text: str) -> list[str]:
    """What is wrong with a Metal source; empty for a good one."""
    if not text.isascii():
        return ["not ASCII: MLX's run-time compiler refuses it"]
    # C++ for OpenCL has its own word.
    text = text.replace("[[kernel]]", "kernel")
    preprocessed, errors = _clang([*build.OPENCL, "-E", "-dD"], text)
    found = errors or list(broken(_without_shim(preprocessed)))
    for standard in STANDARDS:
        cpp = ["-x", "c++", f"-std={standard}", "-pedantic-errors", *build.METAL]
        found += _clang([*cpp, *STRICT, "-fsyntax-only"], text)[1]
    code, errors = _clang([*build.OPENCL, *STRICT, *TO_LLVM], text)
    return found + (errors or list(_check_code(code)))


def _clang(arguments: list[str], text: str) -> tuple[str, list[str]]:
    """What clang makes of a text, and its errors."""
    done = subprocess.run(
        [*build.clang(), *arguments, "-"],
        cwd=build.ROOT,
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    if done.returncode != 0 and not errors:
        raise RuntimeError(done.stderr)
    return done.stdout, errors


def _without_shim(preprocessed: str) -> str:
    """What comes from the source and its own headers."""
    kept, ours = [], False
    for line in preprocessed.splitlines():
        if marker := re.match(r'# \d+ "(.*?)"', line):
            ours = not re.match(r"<(built-in|command line)>|.*/metal_stdlib", marker[1])
        elif ours:
            kept.append(line)
    return "\n".join(kept)


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
