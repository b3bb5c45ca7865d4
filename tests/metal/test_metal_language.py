"""The Metal source is legal Metal as far as Linux can tell, and wrong ones are not.

Apple's compiler has the last word; see host_metal/language.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from host_metal import build, dialect, rules
from host_metal.language import complaints

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac has the real compiler"
)

BODY = "[[kernel]] void k(device float* x [[buffer(0)]]) { %s }"
PLAIN = BODY % "x[0] = 1;"
ARGUMENTS = "[[kernel]] void k(device float* x [[buffer(0)]], %s) { x[i] = 1; }"
TEMPLATE = (
    "template <typename T>\n"
    "[[kernel]] void f(device T* x [[buffer(0)]]) { x[0] = T(1); }\n"
    'template [[host_name("%s")]] [[kernel]] decltype(f<float>) f<float>;\n'
    'template [[host_name("%s")]] [[kernel]] decltype(f<half>) f<%s>;'
)

# A wrong source, the only thing to be said about it (a pattern that every complaint
# holds), and the source put right.
WRONG = {
    # ------------------------ Names that Apple has taken ------------------------
    "as_type in metal": (
        BODY % "x[0] = metal::as_type<float>(1u);",
        "no template named 'as_type' in namespace 'metal'",
        BODY % "x[0] = as_type<float>(1u);",
    ),
    "float16": (
        "typedef half float16;\n" + PLAIN,
        "typedef redefinition .*__Reserved_Name__Do_not_use_float16",
        "typedef half float16_t;\n" + PLAIN,
    ),
    "bfloat16": (
        "typedef bfloat bfloat16;\n" + PLAIN,
        "typedef redefinition .*__Reserved_Name__Do_not_use_bfloat16",
        "typedef bfloat bfloat16_t;\n" + PLAIN,
    ),
    "reserved vector": (
        BODY % "float8* y = 0; x[0] = y != 0;",
        "without an address space: float8 \\* y",
        BODY % "device float4* y = 0; x[0] = y != 0;",
    ),
    "value of a reserved type": (
        "struct A { vector_half8 x; };\n" + PLAIN,
        "incomplete type",
        "struct A { vector_half4 x; };\n" + PLAIN,
    ),
    "packed_ type": (
        "typedef float packed_float3;\n" + PLAIN,
        "typedef redefinition",
        "typedef packed_float3 Triple;\n" + PLAIN,
    ),
    "vector_ type": (
        "struct vector_int2 { int x, y; };\n" + PLAIN,
        "redefinition|conflicts with typedef",
        "struct Pair { int x, y; };\n" + PLAIN,
    ),
    "quad": (
        "struct quad { int x; };\n" + PLAIN,
        "redefinition|conflicts with typedef",
        "struct Quad { int x; };\n" + PLAIN,
    ),
    "complex in metal": (
        "namespace metal { struct complex {}; }\n" + PLAIN,
        "redefinition|conflicts with typedef",
        "namespace ours { struct complex {}; }\n" + PLAIN,
    ),
    "using namespace metal": (
        "using namespace metal;\n" + PLAIN,
        "brings in all of Apple's names",
        "using metal::mem_flags;\n" + PLAIN,
    ),
    "a bare name of metal": (
        BODY % "float level = 1; x[0] = level;",
        "'level' is a name of Apple's namespace metal",
        BODY % "float height = 1; x[0] = height;",
    ),
    "a macro of Apple's": (
        "#define M_PI_F 3.0f\n" + BODY % "x[0] = M_PI_F;",
        "'M_PI_F' is a macro of Apple's headers",
        "#define PI_F 3.0f\n" + BODY % "x[0] = PI_F;",
    ),
    "long long": (
        "typedef long long Wide;\n" + PLAIN,
        "'long long' is not Metal",
        "typedef int64_t Wide;\n" + PLAIN,
    ),
    # ------------------------------ Address spaces ------------------------------
    "pointer without a space": (
        "inline float f(const float* x) { return x[0]; }\n"
        + BODY % "float y = 1; x[0] = f(&y);",
        "without an address space: const float \\* x",
        "inline float f(const thread float* x) { return x[0]; }\n"
        + BODY % "float y = 1; x[0] = f(&y);",
    ),
    "reference without a space": (
        "struct A { float x; };\ninline float f(A& a) { return a.x; }\n"
        + BODY % "A a = {1}; x[0] = f(a);",
        "without an address space: A & a",
        "struct A { float x; };\ninline float f(thread A& a) { return a.x; }\n"
        + BODY % "A a = {1}; x[0] = f(a);",
    ),
    "pointer of a template without a space": (
        "template <typename T> inline T f(T* x) { return x[0]; }\n"
        + BODY % "float y = 1; x[0] = f(&y);",
        "without an address space: T \\* x",
        "template <typename T> inline T f(thread T* x) { return x[0]; }\n"
        + BODY % "float y = 1; x[0] = f(&y);",
    ),
    "vector reference without a space": (
        "inline float f(metal::vec<float, 4>& v) { return v[0]; }\n"
        + BODY % "metal::vec<float, 4> v = {1, 2, 3, 4}; x[0] = f(v);",
        "without an address space: metal :: vec < float , 4 > & v",
        "inline float f(thread metal::vec<float, 4>& v) { return v[0]; }\n"
        + BODY % "metal::vec<float, 4> v = {1, 2, 3, 4}; x[0] = f(v);",
    ),
    "local pointer without a space": (
        BODY % "float y = 1; float* z = &y; x[0] = z[0];",
        "without an address space: float \\* z",
        BODY % "float y = 1; thread float* z = &y; x[0] = z[0];",
    ),
    "second level without a space": (
        BODY % "device float** z = &x; z[0][0] = 1;",
        "without an address space: \\* z",
        BODY % "device float* thread* z = &x; z[0][0] = 1;",
    ),
    "cast to a pointer without a space": (
        BODY % "thread float y = 1; x[0] = *static_cast<float*>(&y);",
        "without an address space: float \\* >",
        BODY % "thread float y = 1; x[0] = *static_cast<thread float*>(&y);",
    ),
    "device as threadgroup": (
        BODY % "threadgroup float* y = x; y[0] = 1;",
        "cannot initialize",
        BODY % "device float* y = x; y[0] = 1;",
    ),
    "threadgroup outside kernel": (
        "inline float f() { threadgroup float s[3]; return s[0]; }\n"
        + BODY % "x[0] = f();",
        "in local address space",
        "inline float f(threadgroup float* s) { return s[0]; }\n"
        + BODY % "threadgroup float s[3]; x[0] = f(s);",
    ),
    "write to constant": (
        "[[kernel]] void k(constant float& x [[buffer(0)]]) { x = 1; }",
        "read-only|const-qualified",
        "[[kernel]] void k(device float& x [[buffer(0)]]) { x = 1; }",
    ),
    "constant without its address space": (
        "constexpr uint n = 4;\n" + BODY % "x[0] = n;",
        "constant address space",
        "constexpr constant uint n = 4;\n" + BODY % "x[0] = n;",
    ),
    # ------------------------------- The language -------------------------------
    "static local": (
        BODY % "static uint n = 0; x[0] = ++n;",
        "static local",
        BODY % "uint n = 0; x[0] = ++n;",
    ),
    "double": (
        BODY % "double y = x[0]; x[0] = y;",
        "double",
        BODY % "float y = x[0]; x[0] = y;",
    ),
    "double literal": (BODY % "x[0] *= 2.0;", "double", BODY % "x[0] *= 2.0f;"),
    "index of 32 bits": (
        "[[kernel]] void k(device float* x [[buffer(0)]],\n"
        "  constant uint64_t& n [[buffer(1)]]) { uint i = n; x[i] = 1; }",
        "loses integer precision",
        "[[kernel]] void k(device float* x [[buffer(0)]],\n"
        "  constant uint64_t& n [[buffer(1)]]) { uint64_t i = n; x[i] = 1; }",
    ),
    "float to bfloat": (
        "[[kernel]] void k(device bfloat* x [[buffer(0)]]) { x[0] = 1.0f; }",
        "no viable overloaded '='|assigning to .*bfloat.* from .*float",
        "[[kernel]] void k(device bfloat* x [[buffer(0)]]) { x[0] = bfloat(1.0f); }",
    ),
    "recursion": (
        "inline float f(float y) { return y > 0 ? f(y - 1) : y; }\n"
        + BODY % "x[0] = f(3);",
        "recursion",
        "inline float f(float y) { return y > 0 ? y - 1 : y; }\n"
        + BODY % "x[0] = f(3);",
    ),
    "mutual recursion": (
        "inline float f(float y);\n"
        "inline float h(float y) { return f(y); }\n"
        "inline float f(float y) { return h(y); }\n" + BODY % "x[0] = f(3);",
        "recursion",
        "inline float h(float y) { return y; }\n"
        "inline float f(float y) { return h(y); }\n" + BODY % "x[0] = f(3);",
    ),
    "function of C": (
        "float expf(float);\n" + BODY % "x[0] = expf(3);",
        "not a function of Metal",
        BODY % "x[0] = metal::precise::sqrt(3.0f);",
    ),
    "lambda": (
        BODY % "auto f = [](float y) { return y; }; x[0] = f(1);",
        "lambda",
        "struct F { float operator()(float y) { return y; } };\n"
        + BODY % "F f; x[0] = f(1);",
    ),
    "pointer to function": (
        "inline void f() {}\n" + BODY % "void (*p)() = f; p(); x[0] = 1;",
        "pointers to functions|address of function",
        "inline void f() {}\n" + BODY % "f(); x[0] = 1;",
    ),
    "virtual": (
        "struct A { virtual void f() {} };\n" + BODY % "A a; a.f(); x[0] = 1;",
        "virtual",
        "struct A { void f() {} };\n" + BODY % "A a; a.f(); x[0] = 1;",
    ),
    "exception": (BODY % "x[0] = 1; throw 1;", "throw", BODY % "x[0] = 1; return;"),
    "new": (
        BODY % "x[0] = *new float(3);",
        "'(default )?new'|operator new",
        BODY % "x[0] = float(3);",
    ),
    "goto": (BODY % "goto a; a: x[0] = 1;", "goto", PLAIN),
    "C++20": (
        "template <typename T> concept C = true;\n" + PLAIN,
        "concept",
        "template <typename T> struct C {};\n" + PLAIN,
    ),
    # ------------------------------- Entry points -------------------------------
    "result of a kernel": (
        "[[kernel]] float k(device float* x [[buffer(0)]]) { return x[0]; }",
        "k: returns float, not void",
        PLAIN,
    ),
    "not marked": (
        "void k(device float* x [[buffer(0)]]) { x[0] = 1; }",
        "k is not marked as a kernel",
        "kernel void k(device float* x [[buffer(0)]]) { x[0] = 1; }",
    ),
    "one name twice": (
        PLAIN + "\n[[kernel]] void k(device half* x [[buffer(0)]]) { x[0] = 1; }",
        "k is defined 2 times",
        PLAIN + "\n[[kernel]] void h(device half* x [[buffer(0)]]) { x[0] = 1; }",
    ),
    "host_name twice": (
        TEMPLATE % ("a", "a", "half"),
        "host_name 'a' is used 2 times",
        TEMPLATE % ("a", "b", "half"),
    ),
    "host_name of another signature": (
        TEMPLATE % ("a", "b", "float"),
        "host_name 'b': f<float> has not the signature of f<half>",
        TEMPLATE % ("a", "b", "half"),
    ),
    "no index": (
        "[[kernel]] void k(device float* x) { x[0] = 1; }",
        r"k: x has no explicit \[\[buffer",
        PLAIN,
    ),
    "no threadgroup index": (
        "[[kernel]] void k(threadgroup float* x [[buffer(0)]]) { x[0] = 1; }",
        r"no explicit \[\[threadgroup",
        "[[kernel]] void k(threadgroup float* x [[threadgroup(0)]]) { x[0] = 1; }",
    ),
    "index too large": (
        "[[kernel]] void k(device float* x [[buffer(31)]]) { x[0] = 1; }",
        "the last is 30",
        "[[kernel]] void k(device float* x [[buffer(30)]]) { x[0] = 1; }",
    ),
    "index used twice": (
        "[[kernel]] void k(device float* x [[buffer(0)]],\n"
        "  const device float* y [[buffer(0)]]) { x[0] = y[0]; }",
        r"buffer\(0\) is used 2 times",
        "[[kernel]] void k(device float* x [[buffer(0)]],\n"
        "  const device float* y [[buffer(1)]]) { x[0] = y[0]; }",
    ),
    "unknown input": (
        ARGUMENTS % "uint i [[thread_index]]",
        "neither a buffer nor a known input",
        ARGUMENTS % "uint i [[thread_index_in_threadgroup]]",
    ),
    "input of a signed type": (
        ARGUMENTS % "int i [[thread_position_in_grid]]",
        "i is a int: thread_position_in_grid is unsigned",
        ARGUMENTS % "uint i [[thread_position_in_grid]]",
    ),
    "input of a floating type": (
        ARGUMENTS.replace("x[i]", "x[uint(i)]") % "float i [[thread_position_in_grid]]",
        "i is a float: thread_position_in_grid is unsigned",
        ARGUMENTS % "ushort i [[thread_position_in_grid]]",
    ),
    "input of 64 bits": (
        ARGUMENTS % "uint64_t i [[thread_position_in_grid]]",
        "i is a uint64_t: thread_position_in_grid is unsigned",
        ARGUMENTS % "uint32_t i [[thread_position_in_grid]]",
    ),
    "vector of four": (
        ARGUMENTS.replace("[i]", "[i.x]") % "uint4 i [[thread_position_in_grid]]",
        "i is a uint4: thread_position_in_grid is unsigned",
        ARGUMENTS.replace("[i]", "[i.x]") % "ushort3 i [[thread_position_in_grid]]",
    ),
    "vector of a number": (
        ARGUMENTS.replace("[i]", "[i.x]") % "uint2 i [[thread_index_in_threadgroup]]",
        "i is a uint2: thread_index_in_threadgroup is unsigned",
        ARGUMENTS % "uint i [[thread_index_in_threadgroup]]",
    ),
    "pointer in a struct": (
        "struct A { device float* x; };\n"
        "[[kernel]] void k(constant A& a [[buffer(0)]]) { a.x[0] = 1; }",
        "k: a is a struct that holds a pointer",
        "struct A { float x; };\n"
        "[[kernel]] void k(device A& a [[buffer(0)]]) { a.x = 1; }",
    ),
    "pointer in a struct in a struct": (
        "struct A { device float* x; };\nstruct B { A a; };\n"
        "[[kernel]] void k(constant B& b [[buffer(0)]]) { b.a.x[0] = 1; }",
        "k: b is a struct that holds a pointer",
        "struct A { float x; };\nstruct B { A a; };\n"
        "[[kernel]] void k(device B& b [[buffer(0)]]) { b.a.x = 1; }",
    ),
    "not ASCII": (PLAIN + " // \N{GREEK SMALL LETTER RHO}", "ASCII", PLAIN + " // rho"),
}


def check(source: str, folder: Path) -> list[str]:
    file = folder / "source.metal"
    file.write_text(f"#include <metal_stdlib>\n{source}\n", encoding="utf-8")
    return complaints(file)


@pytest.mark.parametrize("name", ["adadelta", "norm"])
def test_shipped_source(name: str) -> None:
    assert complaints(build.ROOT / f"metal/{name}.metal") == []


@pytest.mark.parametrize("file", build.METAL_FILES)
def test_shipped_file_is_ascii(file: str) -> None:
    assert (build.ROOT / file).read_bytes().isascii()


@pytest.mark.parametrize("name", WRONG)
def test_wrong_source_and_its_twin(name: str, tmp_path: Path) -> None:
    wrong, expected, right = WRONG[name]
    found = check(wrong, tmp_path)
    assert found
    assert [what for what in found if not re.search(expected, what)] == []
    assert check(right, tmp_path) == []


# ------------------------------- MLX's dialect --------------------------------

# A line that MLX's kernels have no like of, and the word that is new in it.
NEW_WORDS = {
    "x = metal::as_type<uint>(y);": "metal::as_type",
    "enum Sizes : uint { kThreads = 256 };": "typed enum",
    "uint64_t x = 0xD2511F53ul;": "number with suffix ul",
    "unsigned long x;": "type unsigned long",
    "const packed_long4 y; long4 x;": "scalar type long4",
    "static_cast<half>(x)": "cast static_cast<half>",
    "device volatile float* x": "qualifiers device volatile",
    "uint i [[thread_index]]": "[[thread_index]]",
    "device T* x [[buffer(0), raster_order_group(0)]]": "[[raster_order_group()]]",
    "#include <metal_raytracing>": "include <metal_raytracing>",
    '_Pragma("clang fp contract(off)")': "pragma clang fp contract(off)",
    "metal::mulhi(x, y)": "metal::mulhi",
    "goto end;": "goto",
}


def test_only_words_of_mlx() -> None:
    files = [build.ROOT / file for file in build.METAL_FILES]
    assert list(dialect.new_words(files)) == sorted(dialect.EXCEPTIONS)
    # docs/metal.md has their table.
    assert len(dialect.EXCEPTIONS) == 4


@pytest.mark.parametrize("line", NEW_WORDS)
def test_new_word(line: str, tmp_path: Path) -> None:
    changed = tmp_path / "changed.metal"
    text = (build.ROOT / "metal/adadelta.metal").read_text()
    changed.write_text(f"{text}\n{line}\n")
    assert NEW_WORDS[line] in dialect.new_words([changed])


def test_mlx_is_all_accepted() -> None:
    kernels = build.ROOT / build.fetch_metal_headers() / "mlx/backend/metal/kernels"
    files = sorted(kernels.rglob("*.h"))
    assert len(files) > 80
    assert list(dialect.new_words(files)) == []


def test_mlx_names_every_address_space() -> None:
    """The rule is no stricter than Apple's compilers."""
    kernels = build.ROOT / build.fetch_metal_headers() / "mlx/backend/metal/kernels"
    for file in sorted(kernels.rglob("*.h")):
        text = file.read_text()
        assert list(rules.unspaced(text)) == [], file.name
        if file.name == "unary.h":  # and it does look
            assert list(rules.unspaced(text.replace("device ", "")))


# ------------------------- The shim, against the corpus ------------------------

# What MLX's kernels need nothing more for than the shim has.
MLX = """
#define __METAL__
#include "mlx/backend/metal/kernels/defines.h"
#include "mlx/backend/metal/kernels/bf16.h"
#include "mlx/backend/metal/kernels/arange.h"
#include "mlx/backend/metal/kernels/ternary_ops.h"
#include "mlx/backend/metal/kernels/steel/gemm/params.h"
#include "mlx/backend/metal/kernels/steel/conv/params.h"
template void arange<float>(
    constant const float&, constant const float&, device float*, uint);
template void arange<half>(
    constant const half&, constant const half&, device half*, uint);
inline uint16_t there_and_back(uint16_t x) {
  return bfloat16_to_uint16(uint16_to_bfloat16(x));
}
"""


@pytest.mark.parametrize("language", ["C++", "OpenCL"])
def test_shim_takes_kernels_of_mlx(language: str, tmp_path: Path) -> None:
    source = tmp_path / "mlx.metal"
    source.write_text(f"#include <metal_stdlib>\n{MLX}")
    flags = build.OPENCL if language == "OpenCL" else ["-x", "c++", *build.METAL]
    folder = ["-isystem", build.fetch_metal_headers()]
    build.run([*build.clang(), *flags, *folder, "-fsyntax-only", str(source)])


def test_shim_declares_nothing_of_its_own_in_metal() -> None:
    """All but the types, which Apple has at global scope as well."""
    shim = build.ROOT / build.HERE / "include/metal_stdlib"
    text = shim.read_text().split("#define __RESERVED(")[1]
    inside = text[text.index("\nnamespace metal {") :]
    members = set(re.findall(r"(\w+)(?= =|\(|\s*\{|,|\s\})", inside))
    members -= {"class", "if", "float", "ifdef", "metal", "std", "return", "N", "T"}
    kernels = build.ROOT / build.fetch_metal_headers() / "mlx/backend/metal/kernels"
    corpus = " ".join(file.read_text() for file in kernels.rglob("*.h"))
    assert "threadgroup_barrier" in members
    assert {name for name in members if not re.search(rf"\b{name}\b", corpus)} == set()
