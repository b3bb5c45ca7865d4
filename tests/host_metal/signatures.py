"""The kernels' signatures, read from the preprocessed Metal source."""

import re
import sys
from dataclasses import dataclass

_SPACES = {"__global": "device", "__constant": "constant", "__local": "threadgroup"}
_KERNEL = re.compile(r"\bkernel\b[\]\s]*void\s+(\w+)\s*\((.*?)\)\s*\{", re.DOTALL)
_ARGUMENT = re.compile(
    r"(?P<type>[\w\s]+?)\s*(?P<indirection>[*&]?)\s*\b(?P<name>\w+)"
    r"(?:\s*\[\[\s*(?P<attribute>\w+)\s*(?:\(\s*(?P<index>\d+)\s*\))?\s*\]\])?"
)


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel, such as `const device half* w [[buffer(0)]]`."""

    name: str
    type: str  # without qualifiers
    space: str  # "device", "constant", "threadgroup" or none
    const: bool
    indirection: str  # "*", "&" or none
    attribute: str  # "buffer", "thread_position_in_threadgroup", ... or none
    index: int | None


@dataclass(frozen=True)
class Kernel:
    """An entry point of the Metal source."""

    name: str
    arguments: tuple[Argument, ...]


def parse_kernels(preprocessed: str) -> list[Kernel]:
    """The kernels of a source that was preprocessed as C++ for OpenCL."""
    return [
        Kernel(name, tuple(_parse_argument(a) for a in arguments.split(",")))
        for name, arguments in _KERNEL.findall(preprocessed)
    ]


def _parse_argument(text: str) -> Argument:
    match = _ARGUMENT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"cannot read the kernel argument {text.strip()!r}")
    words = match["type"].split()
    space = " ".join(_SPACES[word] for word in words if word in _SPACES)
    return Argument(
        name=match["name"],
        type=" ".join(w for w in words if w not in _SPACES and w != "const"),
        space=space,
        const="const" in words or space == "constant",
        indirection=match["indirection"],
        attribute=_SPACES.get(match["attribute"], match["attribute"] or ""),
        index=None if match["index"] is None else int(match["index"]),
    )


def to_cpp(kernels: list[Kernel]) -> str:
    """The executor's table (executor.h): each kernel, what it binds, a call."""
    return "".join(_kernel_to_cpp(kernel) for kernel in kernels)


def _kernel_to_cpp(kernel: Kernel) -> str:
    bound = [a for a in kernel.arguments if a.attribute in ("buffer", "threadgroup")]
    table = ",\n  ".join(map(_table_entry, bound))
    call = ",\n  ".join(map(_value, kernel.arguments))
    return (
        f'{{"{kernel.name}", {{"{kernel.name}", {{\n  {table}}},\n'
        f" [](const Lane& lane) {{ {kernel.name}(\n  {call}); }}}}}},\n"
    )


def _table_entry(a: Argument) -> str:
    kinds = {"device": "kArray", "constant": "kBytes", "threadgroup": "kThreadgroup"}
    writable = "false" if a.const else "true"
    return (
        f'{{"{a.name}", "{a.type}", sizeof({a.type}), '
        f"Argument::{kinds[a.space]}, {a.index}, {writable}}}"
    )


def _value(a: Argument) -> str:
    if a.attribute == "threadgroup":
        return f"static_cast<threadgroup {a.type}*>(lane.threadgroup_memory)"
    if a.attribute == "buffer":
        pointer = f"static_cast<{'const ' * a.const}{a.type}*>(lane.buffers[{a.index}])"
        return "*" * (a.indirection == "&") + pointer
    value = f"lane.{a.attribute}"
    return f"{value}.x" if a.type == "uint" else f"to_uint3({value})"


if __name__ == "__main__":
    print(to_cpp(parse_kernels(sys.stdin.read())), end="")
