"""Seeds bugs in the Metal code, one at a time, and shows which check sees each.

    python tests/host_metal/mutants.py [--check NAME]... [MUTANT]... > table.md

Works on a copy of the tree, with the Python it is run by (the package and its
`test` extra installed). Prints a Markdown table; a bug that no check sees is an
error. Takes some minutes; all arguments only narrow it down.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900  # seconds; a check that hangs has seen the bug too

KERNELS = "metal/adadelta.metal"
STEP = "metal/adadelta_step.h"
ROUNDING = "metal/rounding.h"
DISPATCH = "csrc/eval_metal.cpp"
LAYOUT = "csrc/layout.cpp"

# What pytest is to run. One parameter type and one pair of them will do: the
# kernels of all types are one template.
CHECKS = {
    "language": ["tests/test_metal_language.py", "-k", "shipped"],
    "ASan and UBSan": [
        *["tests/test_metal_kernels.py", "-k"],
        "asan and (float32_float32_float32 or bfloat16_float32_bfloat16)",
    ],
    "TSan": ["tests/test_metal_kernels.py", "-k", "tsan and float32_float32_float32"],
    "mock": [
        *["tests/test_metal_dispatch.py", "tests/test_functional.py"],
        *["tests/test_layout.py", "tests/test_options.py", "tests/test_rounding.py"],
        *["tests/test_skip.py", "-k", "test_metal_dispatch or host-metal"],
    ],
}

# What a failed check says, best first, and how the table puts it.
REASONS = {
    r"AddressSanitizer: ([\w-]+)": r"\1",
    r"ThreadSanitizer: ([\w ]+?) \(": r"\1",
    r"runtime error: ([^\n]+)": r"\1",
    r"\[host Metal\] ([^\n]+)": r"\1",
    r"(a lane returned before a barrier)": r"\1",
    r"(a barrier that orders no threadgroup memory)": r"\1",
    r"(threadgroup memory is too small)": r"\1",
    r"assert \['([^']+)'": r"\1",
    r"error: ([^\n\[]+)": r"\1",
    r"Mismatched elements|elements differ|nan location": "wrong values",
    r"\n(?:E +)?AssertionError: (\w[^\n]*)": r"\1",
    r"\nE +(assert [^\n]+)": r"\1",
    r"(Segmentation fault|Aborted)": r"\1",
}


@dataclass(frozen=True)
class Mutant:
    """A bug: a piece of a file, which must be there once, and its replacement."""

    file: str
    old: str
    new: str


MUTANTS = {
    # ------------------------------ Kernels -------------------------------
    "linear: no bound check": Mutant(KERNELS, "if (end <= n) {", "if (begin < n) {"),
    "linear: tail left out": Mutant(
        KERNELS,
        "for (ulong i = begin; i < n; ++i) {",
        "for (ulong i = n; i < n; ++i) {",
    ),
    "linear: threads overlap": Mutant(
        KERNELS,
        "ulong end = begin + kElementsPerThread;",
        "ulong end = begin + kElementsPerThread; if (begin > 0) --begin;",
    ),
    "linear: 32-bit index": Mutant(
        KERNELS, "ulong begin = thread_index", "uint begin = thread_index"
    ),
    "tile: no barrier": Mutant(
        KERNELS,
        "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);",
        "",
    ),
    "tile: barrier without memory": Mutant(
        KERNELS, "mem_flags::mem_threadgroup", "mem_flags::mem_none"
    ),
    "tile: early return": Mutant(
        KERNELS,
        "const ulong g_row = first_row + lane.x;",
        "const ulong g_row = first_row + lane.x; if (g_row >= tile.rows) return;",
    ),
    "tile: read without turning": Mutant(
        KERNELS, "staged[lane.x * kTileStride + k]", "staged[k * kTileStride + lane.x]"
    ),
    "tile: last row not staged": Mutant(
        KERNELS, "if (g_row < tile.rows &&", "if (g_row + 1 < tile.rows &&"
    ),
    "tile: no bound check on rows": Mutant(
        KERNELS, "if (row < tile.rows && column", "if (column"
    ),
    "tile: batch ignored": Mutant(
        KERNELS, "static_cast<long>(batch) * tile.batch_stride +", ""
    ),
    "tile: gaps ignored": Mutant(KERNELS, "* tile.column_stride;", "* tile.rows;"),
    "tile: wider than its memory": Mutant(
        KERNELS,
        "staged[k * kTileStride + lane.x]",
        "staged[k * (kTileStride + 1) + lane.x]",
    ),
    "v and u swapped": Mutant(
        STEP, "{w - lr * d, new_v, new_u}", "{w - lr * d, new_u, new_v}"
    ),
    "old v under the root": Mutant(STEP, "sqrt(new_v + p.eps)", "sqrt(v + p.eps)"),
    "half on the way": Mutant(
        KERNELS,
        "static_cast<float>(old_u),",
        "static_cast<float>(static_cast<half>(old_u)),",
    ),
    "writes the old u": Mutant(
        KERNELS, "u_out[i] = Round<S>::nearest(next.u);", "u_out[i] = old_u;"
    ),
    "skip ignored": Mutant(KERNELS, "if (scalars.skip) {", "if (false) {"),
    "scale ignored": Mutant(STEP, "p.sign * gradient_scale * g", "p.sign * g"),
    "random bits of another element": Mutant(
        KERNELS,
        "adadelta_random(i, scalars.step",
        "adadelta_random(i + 1, scalars.step",
    ),
    "subnormal halves rounded down": Mutant(
        ROUNDING, "return sign | (random < odds ? 1u : 0u);", "return sign;"
    ),
    "device pointer to the tile": Mutant(
        KERNELS, "threadgroup float* staged,\n", "device float* staged,\n"
    ),
    "two buffers with one index": Mutant(
        KERNELS,
        "constant ulong& n [[buffer(12)]],",
        "constant ulong& n [[buffer(11)]],",
    ),
    # ------------------------------ Dispatch ------------------------------
    "inputs swapped": Mutant(
        DISPATCH,
        "set_input_array(x.v.source, 2);\n    encoder.set_input_array(x.u.source, 3);",
        "set_input_array(x.u.source, 2);\n    encoder.set_input_array(x.v.source, 3);",
    ),
    "outputs swapped": Mutant(
        DISPATCH,
        "set_output_array(outputs[3 * i], 4);",
        "set_output_array(outputs[3 * i + 1], 4);",
    ),
    "output bound as input": Mutant(
        DISPATCH,
        "set_output_array(outputs[3 * i + 1], 5);",
        "set_input_array(outputs[3 * i + 1], 5);",
    ),
    "buffer not bound": Mutant(
        DISPATCH,
        "encoder.set_input_array(scalar(inputs, j), static_cast<int>(7 + j));",
        "",
    ),
    "uint where ulong is read": Mutant(
        DISPATCH,
        "static_cast<uint64_t>(dispatch.size)",
        "static_cast<uint32_t>(dispatch.size)",
    ),
    "another struct": Mutant(
        DISPATCH, "encoder.set_bytes(x.g.tile, 12);", "encoder.set_bytes(params, 12);"
    ),
    "wrong entry name": Mutant(DISPATCH, '"adadelta_tiled_"', '"adadelta_tile_"'),
    "other types": Mutant(DISPATCH, "types_name(types)", "types_name(0)"),
    "grid one short": Mutant(
        DISPATCH,
        "MTL::Size(blocks(n, threads * kElementsPerThread), 1, 1)",
        "MTL::Size(n / (threads * kElementsPerThread), 1, 1)",
    ),
    "grid of the tile turned": Mutant(
        DISPATCH,
        "blocks(tile.columns, kTileSize),\n            blocks(tile.rows, kTileSize),",
        "blocks(tile.rows, kTileSize),\n            blocks(tile.columns, kTileSize),",
    ),
    "threadgroup too large": Mutant(
        DISPATCH,
        "std::min<size_t>(kThreads, kernel->maxTotalThreadsPerThreadgroup())",
        "kThreads",
    ),
    "threadgroup memory too small": Mutant(
        DISPATCH, "kTileSize * kTileStride * sizeof", "kTileSize * kTileSize * sizeof"
    ),
    "copies not kept": Mutant(
        DISPATCH, "encoder.add_temporary(std::move(copy));", "(void)copy;"
    ),
    "library without a hash": Mutant(
        "csrc/metal_source.cpp.in",
        "mlx_adadelta_@MLX_ADADELTA_METAL_HASH@",
        "mlx_adadelta",
    ),
    "header not embedded": Mutant("CMakeLists.txt", '"${header_source}"', '""'),
    "memory too small": Mutant(
        LAYOUT, "malloc(x->source.nbytes())", "malloc(x->source.nbytes() / 2)"
    ),
}


@contextmanager
def copy_of_tree() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "tree"
        ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out")
        shutil.copytree(ROOT, copy, ignore=ignore)
        wheels = ROOT / "build/macos-wheels"
        if wheels.exists():
            shutil.copytree(wheels, copy / "build/macos-wheels")
        yield copy


@contextmanager
def seeded(tree: Path, mutant: Mutant) -> Iterator[None]:
    file = tree / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file} does not hold this once: {mutant.old}")
    file.write_text(text.replace(mutant.old, mutant.new))
    yield
    file.write_text(text)


def can_see(check: str, mutant: Mutant) -> bool:
    """Whether a check runs what the mutant changes."""
    return check == "mock" or mutant.file in (KERNELS, STEP, ROUNDING)


def run_check(tree: Path, name: str) -> str | None:
    """What a check says against the tree; None if nothing."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*pytest, *CHECKS[name]],
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0:
        return None
    if done.returncode > 1:  # not a test that failed
        raise SystemExit(f"{name} cannot run:\n{done.stdout}")
    for pattern, reason in REASONS.items():
        if match := re.search(pattern, done.stdout):
            return match.expand(reason).strip().replace("|", "/")[:60]
    return "fails"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mutants", nargs="*", metavar="MUTANT", help="default: all")
    parser.add_argument("--check", action="append", choices=CHECKS, dest="checks")
    arguments = parser.parse_args()
    unknown = set(arguments.mutants) - MUTANTS.keys()
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    checks = arguments.checks or list(CHECKS)
    mutants = arguments.mutants or list(MUTANTS)
    survivors = []
    with copy_of_tree() as tree:
        for check in checks:
            if said := run_check(tree, check):
                raise SystemExit(f"{check} fails without any mutant: {said}")
        print(f"| Bug | In | {' | '.join(checks)} |")
        print("|---" * (len(checks) + 2) + "|", flush=True)
        for name in mutants:
            mutant = MUTANTS[name]
            with seeded(tree, mutant):
                said_by = [
                    run_check(tree, check) if can_see(check, mutant) else None
                    for check in checks
                ]
            cells = [name, f"`{mutant.file}`", *(said or "" for said in said_by)]
            print(f"| {' | '.join(cells)} |", flush=True)
            if not any(said_by):
                survivors.append(name)
    for name in survivors:
        print(f"survives: {name}", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
