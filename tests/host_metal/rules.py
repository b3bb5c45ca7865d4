"""Rules of Metal that a C++ compiler does not know, read from the source itself.

Sources are the Metal Shading Language Specification and what Apple's headers
declare; each rule says in one line what it found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from .signatures import Argument, Kernel, parse_kernels

MAX_BUFFERS = 31
FORBIDDEN_WORDS = ("goto", "noexcept", "register", "typeid", "dynamic_cast", "asm")
_TO_OPENCL = {
    "device": "__global",
    "constant": "__constant",
    "threadgroup": "__local",
    "thread": "__private",
}
SPACES = set(_TO_OPENCL.values())
# One number, or a place in up to three dimensions.
NUMBERS = {
    *["simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup"],
    *["thread_index_in_simdgroup", "thread_index_in_threadgroup"],
    "threads_per_simdgroup",
}
PLACES = {
    *["thread_position_in_grid", "thread_position_in_threadgroup"],
    *["threadgroup_position_in_grid", "threadgroups_per_grid"],
    *["threads_per_grid", "threads_per_threadgroup"],
}
_INPUT = re.compile(r"(ushort|uint|uint16_t|uint32_t|unsigned int|unsigned short)")
# What Apple's headers declare in metal beside the types, and would be hidden or
# meant by accident; and the macros that they define.
OF_METAL = re.compile(
    r"(vec|matrix|array|array_ref|access|address|filter|coord|sampler|level|bias|plus"
    r"|minus|multiplies|uniform|component|mem_flags|memory_order|numeric_limits"
    r"|conditional|conjunction|initializer_list|(texture|depth)(1d|2d|3d|cube)\w*)$"
)
MACROS = re.compile(
    r"(M_\w+_[FH]|(FLT|HALF|METAL)_\w+|INFINITY|NAN|MAXFLOAT|HUGE_VAL[FH])$"
)
HOST_NAME = re.compile(
    r"template\s*\[\[\s*host_name\(\s*\"(?P<name>[^\"]+)\"\s*\)\s*\]\]\s*"
    r"\[\[\s*kernel\s*\]\]\s*decltype\((?P<template>[^;]+?)\)\s*(?P<kernel>[^;()]+?);"
)
_TOKEN = re.compile(r"\w+|::|&&|->|[^\s\w]")
_BUILT_IN = re.compile(
    r"(auto|void|bool|s?size_t|ptrdiff_t|u?int(8|16|32|64)_t"
    r"|(u?(char|short|int|long)|half|bfloat|float)\d*)$"
)


def broken(preprocessed: str) -> Iterator[str]:
    """What breaks a rule, in a source preprocessed as C++ for OpenCL with -dD."""
    for name in re.findall(r"^#define (\w+)", preprocessed, re.MULTILINE):
        if MACROS.match(name):
            yield f"{name!r} is a macro of Apple's headers"
    text = re.sub(r"^#.*", "", preprocessed, flags=re.MULTILINE)
    yield from _check_host_names(text)
    text = HOST_NAME.sub("", text)
    tokens = _TOKEN.findall(text)
    yield from _check_words(tokens)
    types = _declared_types(tokens)
    yield from _check_indirections(tokens, types)
    yield from _check_unmarked(tokens)
    kernels = parse_kernels(text)
    for name, count in Counter(kernel.name for kernel in kernels).items():
        if count > 1:
            yield f"{name} is defined {count} times"
    pointers = _structs_with_pointers(tokens, types)
    for kernel in kernels:
        for what in _check_signature(kernel, pointers):
            yield f"{kernel.name}: {what}"


def _check_host_names(text: str) -> Iterator[str]:
    found = list(HOST_NAME.finditer(text))
    for name, count in Counter(match["name"] for match in found).items():
        if count > 1:
            yield f"host_name {name!r} is used {count} times"
    for match in found:
        if match["template"].split() != match["kernel"].split():
            yield (
                f"host_name {match['name']!r}: {match['kernel']} has not the "
                f"signature of {match['template']}"
            )


def _check_words(tokens: list[str]) -> Iterator[str]:
    for before, word, after in zip(
        ["", *tokens], tokens, [*tokens[1:], ""], strict=False
    ):
        if before == word == "long":
            yield "'long long' is not Metal"
        elif word in FORBIDDEN_WORDS:
            yield f"{word!r} is not Metal"
        elif word == "namespace" and before == "using" and after == "metal":
            yield "'using namespace metal' brings in all of Apple's names"
        elif OF_METAL.match(word) and before not in ("::", ".", "->"):
            yield f"{word!r} is a name of Apple's namespace metal"


def _declared_types(tokens: list[str]) -> set[str]:
    types = set()
    for i, word in enumerate(tokens):
        alias = word == "using" and tokens[i + 2] == "="
        if alias or word in ("struct", "class", "enum", "union", "typename"):
            types.add(tokens[i + 1])
        elif word == "typedef":
            types.add(tokens[tokens.index(";", i) - 1])
    return {name for name in types if name.isidentifier()}


def _opening(tokens: list[str], i: int) -> int | None:
    """Where the template argument list that ends at i begins."""
    depth = 0
    while i >= 0 and tokens[i] not in (";", "{", "}"):
        depth += (tokens[i] == ">") - (tokens[i] == "<")
        if depth == 0:
            return i
        i -= 1
    return None


def _indirections(tokens: list[str], types: set[str]) -> Iterator[tuple[int, int]]:
    """Where each * and & of a type stands, and where what it points to begins."""
    seen = set()
    for i, token in enumerate(tokens):
        if token not in ("*", "&", "&&") or i == 0 or tokens[i - 1] == "operator":
            continue
        before = tokens[i - 1]
        a_type = before in types or before in SPACES or before == "const"
        a_type = a_type or bool(_BUILT_IN.match(before)) or i - 1 in seen
        if before == ">":
            start = _opening(tokens, i - 1)
            name = "" if start is None else tokens[start - 1]
            a_type = name.isidentifier() and not name.endswith("_v")
        if not a_type:
            continue
        seen.add(i)
        start = i - 1
        while tokens[start].isidentifier() or tokens[start] in ("::", ">"):
            if tokens[start] == ">":
                at = _opening(tokens, start)
                if at is None:
                    break
                start = at
            start -= 1
        yield i, start + 1


def unspaced(text: str) -> Iterator[str]:
    """Pointers and references without an address space in Metal's own spelling."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"^\s*#.*", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    tokens = [_TO_OPENCL.get(token, token) for token in _TOKEN.findall(text)]
    yield from _check_indirections(tokens, _declared_types(tokens))


def _check_indirections(tokens: list[str], types: set[str]) -> Iterator[str]:
    for i, start in _indirections(tokens, types):
        # A reference to a pointer may go without: MLX writes `device T*& x`.
        to_pointer = tokens[i] == "&" and tokens[i - 1] == "*"
        if not to_pointer and not SPACES & set(tokens[start:i]):
            what = " ".join(tokens[start : i + 2])
            yield f"a pointer or reference without an address space: {what}"


def _check_unmarked(tokens: list[str]) -> Iterator[str]:
    """Functions with numbered buffers that are no kernels. Apple's compiler takes
    them, as MLX's helpers show, but then nobody finds the entry point."""
    names = set()
    for at in range(len(tokens) - 2):
        if tokens[at : at + 3] != ["[", "[", "buffer"]:
            continue
        start, depth = at, 0
        while depth >= 0:
            start -= 1
            depth += (tokens[start] == ")") - (tokens[start] == "(")
        name = start - 1
        while start >= 0 and tokens[start] not in (";", "{", "}"):
            start -= 1
        if "kernel" not in tokens[start + 1 : name]:
            names.add(tokens[name])
    for function in sorted(names):
        yield f"{function} is not marked as a kernel"


def _structs_with_pointers(tokens: list[str], types: set[str]) -> set[str]:
    bodies = {}
    for i, word in enumerate(tokens):
        if word == "struct" and tokens[i + 2] == "{":
            depth, end = 1, i + 3
            while depth > 0:
                depth += (tokens[end] == "{") - (tokens[end] == "}")
                end += 1
            bodies[tokens[i + 1]] = tokens[i + 3 : end]
    pointers = {
        name for name, body in bodies.items() if any(_indirections(body, types))
    }
    while more := {
        name
        for name, body in bodies.items()
        if name not in pointers and pointers & set(body)
    }:
        pointers |= more
    return pointers


def _check_signature(kernel: Kernel, pointers: set[str]) -> Iterator[str]:
    if kernel.returns != "void":
        yield f"returns {kernel.returns}, not void"
    for argument in kernel.arguments:
        if what := _check_argument(argument):
            yield f"{argument.name} {what}"
        elif argument.type in pointers:
            yield f"{argument.name} is a struct that holds a pointer"
    places = Counter((a.attribute, a.index) for a in kernel.arguments)
    for (attribute, index), count in places.items():
        if attribute and count > 1:
            place = attribute if index is None else f"{attribute}({index})"
            yield f"{place} is used {count} times"


def _check_argument(a: Argument) -> str | None:
    expected = {"device": "buffer", "constant": "buffer", "threadgroup": "threadgroup"}
    if not a.indirection:
        if a.attribute not in PLACES | NUMBERS or a.index is not None:
            return "is neither a buffer nor a known input"
        scalar = _INPUT.fullmatch(a.type)
        vector = a.attribute in PLACES and _INPUT.fullmatch(a.type.rstrip("23"))
        return None if scalar or vector else f"is a {a.type}: {a.attribute} is unsigned"
    if a.space not in expected:
        return None  # said of every such pointer
    if a.attribute != expected[a.space] or a.index is None:
        return f"has no explicit [[{expected[a.space]}(index)]]"
    if a.index >= MAX_BUFFERS:
        return f"has index {a.index}, the last is {MAX_BUFFERS - 1}"
    return None
