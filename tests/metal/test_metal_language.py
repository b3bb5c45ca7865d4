"""The Metal source is legal Metal as far as Linux can tell, and wrong ones are not.

Apple's compiler has the last word; see host_metal/language.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from host_metal import build
from host_metal.language import complaints

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac has the real compiler"
)

ONE_BUFFER = "kernel void k(device float* x [[buffer(0)]]) { %s }"

# A source, and what is to be said about it.
WRONG = {
    "generic pointer": (
        "inline void f(float* x) { x[0] = 1; }\n" + ONE_BUFFER % "f(x);",
        "no matching function",
    ),
    "generic local pointer": (
        ONE_BUFFER % "float* y = x; y[0] = 1;",
        "cannot initialize",
    ),
    "device as threadgroup": (
        ONE_BUFFER % "threadgroup float* y = x; y[0] = 1;",
        "cannot initialize",
    ),
    "threadgroup outside kernel": (
        "inline void f() { threadgroup float s[3]; s[0] = 1; }\n"
        + ONE_BUFFER % "f(); x[0] = 1;",
        "local address space",
    ),
    "write to constant": (
        "kernel void k(constant float& x [[buffer(0)]]) { x = 1; }",
        "read-only",
    ),
    "constant without its address space": (
        "constexpr uint n = 4;\n" + ONE_BUFFER % "x[0] = n;",
        "constant address space",
    ),
    "static local": (
        ONE_BUFFER % "static uint n = 0; x[0] = ++n;",
        "static local",
    ),
    "double": (ONE_BUFFER % "double y = x[0]; x[0] = y;", "double"),
    "double literal": (ONE_BUFFER % "x[0] *= 2.0;", "double"),
    "index of 32 bits": (
        "kernel void k(device float* x [[buffer(0)]], constant ulong& n [[buffer(1)]])"
        "{ uint i = n; x[i] = 1; }",
        "loses integer precision",
    ),
    "float to bfloat": (
        "kernel void k(device bfloat* x [[buffer(0)]]) { x[0] = 1.0f; }",
        "no viable overloaded '='",
    ),
    "recursion": (
        "inline float f(float y) { return y > 0 ? f(y - 1) : y; }\n"
        + ONE_BUFFER % "x[0] = f(3);",
        "recursion",
    ),
    "mutual recursion": (
        "inline float f(float y);\n"
        "inline float h(float y) { return f(y); }\n"
        "inline float f(float y) { return h(y); }\n" + ONE_BUFFER % "x[0] = f(3);",
        "recursion",
    ),
    "function of C": (
        "float expf(float);\n" + ONE_BUFFER % "x[0] = expf(3);",
        "not a function of Metal",
    ),
    "lambda": (
        ONE_BUFFER % "auto f = [](float y) { return y; }; x[0] = f(1);",
        "lambda",
    ),
    "pointer to function": (
        "inline void f() {}\n" + ONE_BUFFER % "void (*p)() = f; p(); x[0] = 1;",
        "pointers to functions",
    ),
    "virtual": (
        "struct A { virtual void f() {} };\n" + ONE_BUFFER % "A a; a.f(); x[0] = 1;",
        "virtual",
    ),
    "exception": (ONE_BUFFER % "x[0] = 1; throw 1;", "throw"),
    "new": (ONE_BUFFER % "x[0] = *new float(3);", "new"),
    "goto": (ONE_BUFFER % "goto a; a: x[0] = 1;", "goto"),
    "C++20": (
        "template <typename T> concept C = true;\n" + ONE_BUFFER % "x[0] = 1;",
        "concept",
    ),
    "result of a kernel": (
        "kernel float k(device float* x [[buffer(0)]]) { return x[0]; }",
        "void",
    ),
    "no index": ("kernel void k(device float* x) { x[0] = 1; }", "no explicit"),
    "no threadgroup index": (
        "kernel void k(threadgroup float* x [[buffer(0)]]) { x[0] = 1; }",
        "no explicit [[threadgroup(index)]]",
    ),
    "index too large": (
        "kernel void k(device float* x [[buffer(31)]]) { x[0] = 1; }",
        "the last is 30",
    ),
    "index used twice": (
        "kernel void k(device float* x [[buffer(0)]],\n"
        "  const device float* y [[buffer(0)]]) { x[0] = y[0]; }",
        "buffer(0) is used 2 times",
    ),
    "unknown input": (
        "kernel void k(device float* x [[buffer(0)]], uint i [[thread_index]])\n"
        "{ x[i] = 1; }",
        "neither a buffer nor a known input",
    ),
    "not ASCII": (ONE_BUFFER % "x[0] = 1;" + " // \N{GREEK SMALL LETTER RHO}", "ASCII"),
}


def test_shipped_source() -> None:
    assert complaints(build.ROOT / "metal/adadelta.metal") == []


@pytest.mark.parametrize("file", build.METAL_FILES)
def test_shipped_file_is_ascii(file: str) -> None:
    assert (build.ROOT / file).read_bytes().isascii()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_source(name: str, tmp_path: Path) -> None:
    source, expected = WRONG[name]
    file = tmp_path / "wrong.metal"
    file.write_text(f"#include <metal_stdlib>\n{source}\n", encoding="utf-8")
    found = complaints(file)
    assert any(re.search(re.escape(expected), what) for what in found), found


def test_small_source_is_right(tmp_path: Path) -> None:
    file = tmp_path / "right.metal"
    file.write_text(f"#include <metal_stdlib>\n{ONE_BUFFER % 'x[0] = 1;'}\n")
    assert complaints(file) == []
