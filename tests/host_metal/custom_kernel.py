"""A stand-in for mx.fast.metal_kernel that runs on the host.

Composes the text that MLX hands to Apple's compiler (write_signature in
mlx/backend/common/metal_kernel.cpp of MLX 0.32.1, the same as in 0.30.6 but for the
function's name), compiles it over the shim and runs it in the executor when the
arrays are evaluated. Template arguments, initial values and atomic outputs are left
out; so is most of the preamble, mlx/backend/metal/kernels/utils.h.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx

from mlx_adadelta import metal_road

from . import build
from .backend import load_from
from .signatures import parse_kernels, to_cpp

# What MLX's preamble brings into scope, beside names that only it uses.
PREAMBLE = """#include <metal_stdlib>
#include "mlx/backend/metal/kernels/defines.h"
#include "mlx/backend/metal/kernels/bf16.h"
typedef half float16_t;
"""
TYPES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t"}
TYPES |= {mx.bool_: "bool", mx.int64: "int64_t", mx.uint64: "uint64_t"}
# What a body may name of an input, such as `g_shape`, in the order of arguments.
INFOS = {"shape": "int*", "strides": "int64_t*", "ndim": "int&"}
MOST_CONSTANT = 8  # fewer elements come as `constant`
ATTRIBUTES = (
    *["thread_position_in_threadgroup", "threadgroup_position_in_grid"],
    "threadgroups_per_grid",
)
# Of the threadgroup memory that a body declares, the host has the executor's.
STAGED = re.compile(r"threadgroup (\w+) (\w+)\s*\[(.*?)\];", re.DOTALL)
LIBRARY = """#include "executor.h"

static thread_local void* threadgroup_memory;

{text}
static void (*meet)();

void metal::threadgroup_barrier(mem_flags flags) {{
  if (flags != mem_flags::mem_threadgroup) {{
    throw "a barrier that orders no threadgroup memory";
  }}
  meet();
}}

static uint3 to_uint3(const host_metal::Size& size) {{
  return {{size.x, size.y, size.z}};
}}

extern "C" __attribute__((visibility("default"))) const host_metal::Kernel*
host_metal_kernel(void (*wait)(), size_t* threadgroup_bytes) {{
  using namespace host_metal;
  {{
    using namespace mlx_adadelta;
    *threadgroup_bytes = {bytes};
  }}
  meet = wait;
  static const std::pair<std::string, Kernel> entry = {entry};
  return &entry.second;
}}
"""


@functools.cache
def module() -> ModuleType:
    build.build(build.CUSTOM)
    return load_from(build.ROOT / build.BUILD / build.CUSTOM)


def signature(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, mx.Dtype],
    body: str,
) -> str:
    """The function, with an argument for each array and for what the body names."""
    arguments: list[str] = []

    def add(text: str) -> None:
        arguments.append(f"  {text} [[buffer({len(arguments)})]]")

    for x, array in inputs.items():
        space = "constant" if array.size < MOST_CONSTANT else "device"
        add(f"const {space} {TYPES[array.dtype]}{'*' if array.ndim else '&'} {x}")
        for info, kind in INFOS.items():
            if array.ndim > 0 and f"{x}_{info}" in body:
                add(f"const constant {kind} {x}_{info}")
    for x, dtype in outputs.items():
        add(f"device {TYPES[dtype]}* {x}")
    arguments += [f"  uint3 {x} [[{x}]]" for x in ATTRIBUTES if x in body]
    return f"[[kernel]] void {name}(\n" + ",\n".join(arguments) + f") {{\n{body}\n}}\n"


@functools.cache
def compile_library(text: str) -> str:
    """The path of a library with this text's kernel."""
    source = PREAMBLE + text
    include = ["-isystem", build.fetch_metal_headers(), f"-I{build.HERE}"]
    preprocess = [*build.OPENCL, *include, "-E", "-P", "-"]
    [kernel] = parse_kernels(build.run([*build.clang(), *preprocess], source))
    staged = STAGED.search(text)
    assert staged is not None
    memory = f"static_cast<threadgroup {staged[1]}*>(threadgroup_memory)"
    on_host = STAGED.sub(rf"threadgroup \1* \2 = {memory};", source)
    entry = to_cpp([kernel]).rstrip(",\n")
    library = LIBRARY.format(
        text=on_host,
        bytes=f"sizeof({staged[1]}) * ({staged[3]})",
        entry=entry.replace(
            "(const Lane& lane) {",
            "(const Lane& lane) { threadgroup_memory = lane.threadgroup_memory;",
        ),
    )
    flags = [*build.CPP, *build.KERNELS, *include, "-O2", build.SEPARATE, "-shared"]
    parts = [library, *flags, (build.ROOT / build.HERE / "executor.h").read_text()]
    parts.append((build.ROOT / build.HERE / "include/metal_stdlib").read_text())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    target = f"{build.BUILD}/custom/{digest}"
    if not (build.ROOT / f"{target}.so").exists():
        partial = f"{target}.{os.getpid()}"  # another process may compile it, too
        build.write_if_changed(f"{partial}.cpp", library)
        build.run([*build.clang(), *flags, f"{partial}.cpp", "-o", partial])
        (build.ROOT / partial).rename(build.ROOT / f"{target}.so")
    return str(build.ROOT / f"{target}.so")


# What a CPU stream then runs in place of an extension.
EXTENSION = SimpleNamespace(**vars(metal_road), has_metal=False)

# The text of each function so far: before MLX 0.32.0, which adds the types to the
# name, another one under the same name was a use after free.
texts: dict[str, str] = {}


def metal_kernel(
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
) -> Callable[..., list[mx.array]]:
    """mx.fast.metal_kernel, where it may not copy its inputs."""
    if ensure_row_contiguous or any(x in header for x in ("[[kernel]]", "kernel void")):
        raise NotImplementedError
    infos = [[info for info in INFOS if f"{x}_{info}" in source] for x in input_names]

    def run(
        *,
        inputs: list[mx.array],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        stream: Any = None,
    ) -> list[mx.array]:
        named = dict(zip(input_names, inputs, strict=True))
        outputs = dict(zip(output_names, output_dtypes, strict=True))
        function = f"custom_kernel_{name}"
        text = header + signature(function, named, outputs, source)
        if texts.setdefault(function, text) != text:
            raise RuntimeError(f"{function} has two texts")
        with mx.stream(stream or mx.cpu):
            return module().make_arrays(
                *(compile_library(text), inputs, infos),
                *([list(shape) for shape in output_shapes], output_dtypes),
                *(grid, threadgroup),
            )

    return run
