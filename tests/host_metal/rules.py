"""Rules of Metal that a C++ compiler does not know, read from the source itself.

They are the Metal Shading Language Specification's, and what Apple's headers declare;
each says in one line what it found.
"""

import re
from collections import Counter
from collections.abc import Iterator

from .signatures import Argument, Kernel, parse_kernels

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


def broken(preprocessed: str) -> Iterator[str]:
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
