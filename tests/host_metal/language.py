"""Whether a source is legal Metal, as far as other compilers can tell.

C++ for OpenCL has the address spaces of Metal and most of what Metal forbids
(virtual functions, exceptions, new, double, pointers to functions, static locals).
What it lacks is looked up in the code that comes out, or in the source itself: rules of
the Metal Shading Language Specification, and what Apple's headers declare.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator

from . import build
from .signatures import Argument, Kernel, parse_kernels

# Metal 3 is C++14, Metal 4 is C++17.
STANDARDS = ("c++14", "c++17")
STRICT = [
    *["-Wall", "-Wextra", "-Wshorten-64-to-32", "-Werror"],
    # The shim's `constant` is const, and MLX says both.
    *["-Wno-unknown-attributes", "-Wno-duplicate-decl-specifier"],
    "-Wno-unused-const-variable",  # the headers' numbers are other kernels', too
]
TO_LLVM = ["-O0", "-S", "-emit-llvm", "-o", "-"]

MAX_BUFFERS = 31
# What the kernels may ask of the grid: one number or a place in three dimensions.
INPUTS = {
    *["thread_position_in_threadgroup", "threads_per_threadgroup"],
    *["threadgroup_position_in_grid", "threadgroups_per_grid"],
}
# What Apple's headers declare in metal beside the types, and would be hidden or
# meant by accident; and the macros that they define.
OF_METAL = re.compile(
    r"(?<![\w:.>])(vec|matrix|array|array_ref|access|address|filter|coord|sampler"
    r"|level|bias|plus|minus|multiplies|uniform|component|mem_flags|memory_order"
    r"|numeric_limits|conditional|conjunction|initializer_list"
    r"|(?:texture|depth)(?:1d|2d|3d|cube)\w*)\b"
)
MACROS = re.compile(
    r"^#define ((?:M_\w+_[FH]|(?:FLT|HALF|METAL)_\w+|INFINITY|NAN|MAXFLOAT"
    r"|HUGE_VAL[FH])\b)",
    re.MULTILINE,
)
# A type and its `*` or `&`, which a formatted source writes without a space between.
# A reference to a pointer may go without an address space: MLX writes `device T*& x`.
_TEMPLATE_ARGUMENTS = r"<(?:[^<>;]|<[^<>;]*>)*>"
_INDIRECTION = re.compile(
    rf"((?:[\w:\s]|{_TEMPLATE_ARGUMENTS})*)(?<=[\w>])(\*&|\*+|&)(?= ?[\w>])"
)
# In Metal, and in C++ for OpenCL.
_SPACE = re.compile(
    r"\b(device|constant|threadgroup|thread|__global|__constant|__local|__private)\b"
)


def complaints(text: str) -> list[str]:
    """What is wrong with a Metal source; empty for a good one."""
    if not text.isascii():
        return ["not ASCII: MLX's run-time compiler refuses it"]
    # C++ for OpenCL has its own word.
    text = text.replace("[[kernel]]", "kernel")
    preprocessed, errors = _clang([*build.OPENCL, "-E", "-dD"], text)
    found = errors or list(_broken(_without_shim(preprocessed)))
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


# --------------------------- Rules that no compiler knows -------------------------


def _broken(preprocessed: str) -> Iterator[str]:
    """What breaks a rule, in a source preprocessed as C++ for OpenCL with -dD."""
    for name in MACROS.findall(preprocessed):
        yield f"{name!r} is a macro of Apple's headers"
    text = re.sub(r"^#.*", "", preprocessed, flags=re.MULTILINE)
    if re.search(r"\blong\s+long\b", text):
        yield "'long long' is not Metal"
    if re.search(r"\busing\s+namespace\s+metal\b", text):
        yield "'using namespace metal' brings in all of Apple's names"
    for name in OF_METAL.findall(text):
        yield f"{name!r} is a name of Apple's namespace metal"
    yield from unspaced(text)
    for kernel in parse_kernels(text):
        for what in _check_signature(kernel):
            yield f"{kernel.name}: {what}"


def unspaced(text: str) -> Iterator[str]:
    """Pointers and references, in helpers too, without an address space."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"^\s*#.*", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    for match in _INDIRECTION.finditer(text):
        if match[2] == "**" or not _SPACE.search(match[1]):
            what = " ".join(match[0].split())
            yield f"a pointer or reference without an address space: {what}"


def _check_signature(kernel: Kernel) -> Iterator[str]:
    for argument in kernel.arguments:
        if what := _check_argument(argument):
            yield f"{argument.name} {what}"
    places = Counter((a.attribute, a.index) for a in kernel.arguments)
    for (attribute, index), count in places.items():
        if attribute and count > 1:
            yield f"{attribute}({index}) is used {count} times"


def _check_argument(a: Argument) -> str | None:
    expected = {"device": "buffer", "constant": "buffer", "threadgroup": "threadgroup"}
    if not a.indirection:
        known = a.attribute in INPUTS and a.type in ("uint", "uint3")
        return None if known else f"is a {a.type}: neither a buffer nor a known input"
    if a.space not in expected:
        return None  # said of every such pointer
    if a.attribute != expected[a.space] or a.index is None:
        return f"has no explicit [[{expected[a.space]}(index)]]"
    if a.index >= MAX_BUFFERS:
        return f"has index {a.index}, the last is {MAX_BUFFERS - 1}"
    return None
