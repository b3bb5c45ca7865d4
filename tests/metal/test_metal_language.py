"""The Metal source is legal Metal as far as Linux can tell, and wrong ones are not.

Apple's compiler has the last word; see host_metal/language.py.
"""

import re
import sys

import pytest
from host_metal import build, dialect
from host_metal.language import complaints, unspaced

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac has the real compiler"
)

BODY = "[[kernel]] void k(device float* x [[buffer(0)]]) { %s }"
PLAIN = BODY % "x[0] = 1;"
ARGUMENTS = "[[kernel]] void k(device float* x [[buffer(0)]], %s) { x[i] = 1; }"
# Apple's headers have these names at global scope and in metal.
TAKEN = ["float16", "bfloat16", "vector_half8", "packed_float3", "vector_int2"]
TAKEN += ["quad", "complex", "ulong", "uint64_t"]

# A wrong source, the only thing to be said about it (a pattern that every complaint
# holds), and the source put right.
WRONG = {
    # ------------------------------- Apple's names ------------------------------
    "as_type in metal": (
        BODY % "x[0] = metal::as_type<float>(1u);",
        "no template named 'as_type' in namespace 'metal'",
        BODY % "x[0] = as_type<float>(1u);",
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
        "without an address space: const float\\*",
        "inline float f(const thread float* x) { return x[0]; }\n"
        + BODY % "float y = 1; x[0] = f(&y);",
    ),
    "reference without a space": (
        "struct A { float x; };\ninline float f(A& a) { return a.x; }\n"
        + BODY % "A a = {1}; x[0] = f(a);",
        "without an address space: A&",
        "struct A { float x; };\ninline float f(thread A& a) { return a.x; }\n"
        + BODY % "A a = {1}; x[0] = f(a);",
    ),
    "vector reference without a space": (
        "inline float f(metal::vec<float, 4>& v) { return v[0]; }\n"
        + BODY % "metal::vec<float, 4> v = {1, 2, 3, 4}; x[0] = f(v);",
        "without an address space: metal::vec<float, 4>&",
        "inline float f(thread metal::vec<float, 4>& v) { return v[0]; }\n"
        + BODY % "metal::vec<float, 4> v = {1, 2, 3, 4}; x[0] = f(v);",
    ),
    "second level without a space": (
        BODY % "device float** z = &x; z[0][0] = 1;",
        "without an address space: __global float\\*\\*",
        BODY % "device float* thread* z = &x; z[0][0] = 1;",
    ),
    "cast to a pointer without a space": (
        BODY % "thread float y = 1; x[0] = *static_cast<float*>(&y);",
        "without an address space: float\\*",
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
    # ------------------------------- Entry points -------------------------------
    "result of a kernel": (
        "[[kernel]] float k(device float* x [[buffer(0)]]) { return x[0]; }",
        "kernel must have void return type",
        PLAIN,
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
        "i is a uint: neither a buffer nor a known input",
        ARGUMENTS % "uint i [[thread_position_in_threadgroup]]",
    ),
    "input of a signed type": (
        ARGUMENTS % "int i [[thread_position_in_threadgroup]]",
        "i is a int: neither a buffer nor a known input",
        ARGUMENTS % "uint i [[thread_position_in_threadgroup]]",
    ),
    "not ASCII": (PLAIN + " // \N{GREEK SMALL LETTER RHO}", "ASCII", PLAIN + " // rho"),
}


def check(source: str) -> list[str]:
    return complaints(f"#include <metal_stdlib>\n{source}\n")


@pytest.mark.parametrize("name", ["adadelta.metal", "norm.metal"])
def test_shipped_source(name: str) -> None:
    """With its headers in it, as MLX's run-time compiler gets it."""
    assert complaints(build.metal_source(name)) == []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_source_and_its_twin(name: str) -> None:
    wrong, expected, right = WRONG[name]
    found = check(wrong)
    assert found
    assert [what for what in found if not re.search(expected, what)] == []
    assert check(right) == []


@pytest.mark.parametrize("name", TAKEN)
def test_name_is_taken(name: str) -> None:
    for source in ("struct %s { int x; };\n", "namespace metal { struct %s {}; }\n"):
        found = check(source % name + PLAIN)
        assert found
        assert all("redefinition" in x or "conflicts with" in x for x in found), found
        assert check(source.replace("metal", "ours") % f"{name}_of_ours" + PLAIN) == []


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
    "throw 1;": "throw",
    "virtual void f() {}": "virtual",
    "float* x = new float(3);": "new",
    "double x;": "scalar type double",
    "template <typename T> concept C = true;": "concept",
    "register int x;": "register",
    "typeid(x)": "typeid",
    "dynamic_cast<A>(x)": "dynamic_cast",
    'asm("");': "asm",
}


def test_only_words_of_mlx() -> None:
    texts = [(build.ROOT / file).read_text() for file in build.METAL_FILES]
    assert dialect.new_words(*texts) == sorted(dialect.EXCEPTIONS)


@pytest.mark.parametrize("line", NEW_WORDS)
def test_new_word(line: str) -> None:
    text = (build.ROOT / "metal/adadelta.metal").read_text()
    assert NEW_WORDS[line] in dialect.new_words(f"{text}\n{line}\n")


def test_mlx_names_every_address_space() -> None:
    """The rule is no stricter than Apple's compilers."""
    files = dialect.kernels_of_mlx()
    assert len(files) > 80
    # Products that clang-format takes for pointers.
    products = {"BCOLS_PACKED*", "BCOLS : BROWS*", "BROWS*", "n_reads*", "WM*"}
    for name, text in files.items():
        found = {what.partition("space: ")[2] for what in unspaced(text)}
        assert found <= products, name
    assert list(unspaced(files["unary.h"].replace("device ", "")))


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
def test_shim_takes_kernels_of_mlx(language: str) -> None:
    flags = build.OPENCL if language == "OpenCL" else ["-x", "c++", *build.METAL]
    folder = ["-isystem", build.fetch_metal_headers()]
    command = [*build.clang(), *flags, *folder, "-fsyntax-only", "-"]
    build.run(command, f"#include <metal_stdlib>\n{MLX}")
