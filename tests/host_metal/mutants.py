"""Seeds bugs in the Metal code, one at a time, and shows which check sees each.

    python tests/host_metal/mutants.py [--write] [MUTANT]...

Works on a copy of the tree, with the Python it is run by (the package and its
`test` extra installed). Prints a Markdown table, or writes it into docs/metal.md
with a digest of the sources; a bug that no check sees is an error. Takes half an
hour; names of mutants narrow it down.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOBODY = ("", "")
TIMEOUT = 900  # seconds; a check that hangs has seen the bug too

KERNELS = "metal/adadelta.metal"
STEP = "metal/adadelta_step.h"
ROUNDING = "metal/rounding.h"
DISPATCH = "csrc/eval_metal.cpp"
LAYOUT = "csrc/layout.cpp"
DOCUMENT = "docs/metal.md"

# What the kernels' checks compile: the kernels of all types are one template.
TYPES = ("float32, float32, float32", "bfloat16, bfloat16, bfloat16")
# What pytest is to run.
CHECKS = {
    "language": ["tests/metal/test_metal_language.py", "-k", "shipped"],
    "ASan and UBSan": [
        *["tests/metal/test_metal_kernels.py", "-k"],
        "beyond or asan-linear or asan-tiled",
    ],
    "TSan": ["tests/metal/test_metal_kernels.py", "-k", "tsan"],
    "count": ["tests/metal/test_metal_count.py"],
    "mock": [
        *["tests/metal/test_metal_dispatch.py", "tests/update/test_functional.py"],
        *["tests/update/test_layout.py", "tests/update/test_rounding.py"],
        *["tests/update/test_skip.py", "-k", "test_metal_dispatch or host-metal"],
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
    """A bug: a piece of a file, which must be there once, and its replacement.

    Spaces and line breaks of the piece need not be the file's; `~` in it stands for
    any name, and in the replacement for the same names in order.
    """

    file: str
    old: str
    new: str

    def seed(self, text: str) -> str:
        tokens = re.findall(r"~|\w+|[^\w\s]", self.old)
        pattern = r"\s*".join(
            r"(\w+)" if x == "~" else rf"\b{x}\b" if x[0].isalnum() else re.escape(x)
            for x in tokens
        )
        found = list(re.finditer(pattern, text))
        if len(found) != 1:
            raise ValueError(f"{self.file} holds this {len(found)} times: {self.old}")
        names = iter(found[0].groups())
        new = re.sub("~", lambda _: next(names), self.new)
        return text[: found[0].start()] + new + text[found[0].end() :]


MUTANTS = {
    # ------------------------------ Kernels -------------------------------
    "linear: no bound check": Mutant(
        KERNELS, "places.inside[k] = places.at[k] < n;", "places.inside[k] = true;"
    ),
    "linear: vectors beyond the end": Mutant(
        KERNELS, "aligned && begin + lanes * N <= n", "aligned && begin + lane * N < n"
    ),
    "linear: tail left out": Mutant(
        KERNELS, "places.inside[k] = places.at[k] < n;", "places.inside[k] = false;"
    ),
    "linear: threads overlap": Mutant(
        KERNELS, "k * lanes + lane", "k * lanes + lane - (lane > 0)"
    ),
    "linear: groups counted in 32 bits": Mutant(
        KERNELS, "static_cast<uint64_t>(group) * lanes * N", "group * lanes * N"
    ),
    "linear: vectors wherever": Mutant(KERNELS, "vectors = aligned &&", "vectors ="),
    "linear: a vector's elements turned": Mutant(
        KERNELS, "x[k % 4] = from[k];", "x[3 - k % 4] = from[k];"
    ),
    "tile: no barrier": Mutant(
        KERNELS, "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);", ""
    ),
    "tile: barrier without memory": Mutant(
        KERNELS, "mem_flags::mem_threadgroup", "mem_flags::mem_none"
    ),
    "tile: early return": Mutant(
        KERNELS,
        "Places<N> g_places;",
        "Places<N> g_places; if (row + lane.x >= tile.rows) return;",
    ),
    "tile: read without turning": Mutant(
        KERNELS,
        "x.g[k] = staged[c * stride + r];",
        "x.g[k] = staged[r * stride + c];",
    ),
    "tile: last row not staged": Mutant(
        KERNELS,
        "g_places.inside[k] = row + r < tile.rows",
        "g_places.inside[k] = row + r + 1 < tile.rows",
    ),
    "tile: no bound check on rows": Mutant(
        KERNELS, "  places.inside[k] = row + r < tile.rows &&", "places.inside[k] ="
    ),
    "tile: whole by its rows alone": Mutant(
        KERNELS, "&& column + columns <= tile.columns", ""
    ),
    "tile: batch ignored": Mutant(KERNELS, "group.z * tile.batch_stride +", ""),
    "tile: gaps ignored": Mutant(
        KERNELS,
        "(column + lane.y) * tile.column_stride",
        "(column + lane.y) * tile.rows",
    ),
    "tile: column stride of 31 bits": Mutant(
        KERNELS,
        "(column + lane.y) * tile.column_stride",
        "(column + lane.y) * static_cast<int32_t>(tile.column_stride)",
    ),
    "tile: rows in 32 bits": Mutant(
        KERNELS,
        "kTileHeight * static_cast<uint64_t>(tile.columns)",
        "kTileHeight * tile.columns",
    ),
    "tile: wider than its memory": Mutant(
        KERNELS,
        "stride = kTileStride / sizeof(G)",
        "stride = kTileStride / sizeof(G) + 1",
    ),
    "tile: half of a thread's elements": Mutant(
        KERNELS,
        "N = rows * columns / (kTileWidth * kTileHeight)",
        "N = rows * columns / (kTileWidth * kTileHeight) / 2",
    ),
    "v and u swapped": Mutant(
        STEP, "{w - lr * d, new_v, new_u}", "{w - lr * d, new_u, new_v}"
    ),
    "old v under the root": Mutant(STEP, "(new_v + p.eps)", "(v + p.eps)"),
    "half on the way": Mutant(
        KERNELS,
        "static_cast<float>(x.u[k]),",
        "static_cast<float>(static_cast<half>(static_cast<float>(x.u[k]))),",
    ),
    "writes the old u": Mutant(
        KERNELS, "x.u[k] = Round<S>::nearest(next.u);", "(void)next.u;"
    ),
    "skip ignored": Mutant(KERNELS, "else if (!scalars.skip)", "else"),
    "scale ignored": Mutant(STEP, "p.sign * gradient_scale * g", "p.sign * g"),
    "a store before the last load": Mutant(
        KERNELS,
        "read<kHow>(arrays.u, places, x.u);",
        "write<kHow>(x.w, places, arrays.w_out); read<kHow>(arrays.u, places, x.u);",
    ),
    "threadgroup memory as the device's": Mutant(
        KERNELS, "threadgroup G* staged, uint3", "device G* staged, uint3"
    ),
    "two buffers with one index": Mutant(
        KERNELS,
        "constant uint64_t& n [[buffer(12)]]",
        "constant uint64_t& n [[buffer(11)]]",
    ),
    # ------------------------------ Dispatch ------------------------------
    "inputs swapped": Mutant(DISPATCH, "&x.v, &x.u}", "&x.u, &x.v}"),
    "outputs swapped": Mutant(
        DISPATCH,
        "encoder.set_output_array(outputs[j], index++)",
        "encoder.set_output_array(outputs[6 * i + 2 - j], index++)",
    ),
    "output bound as input": Mutant(
        DISPATCH,
        "encoder.set_output_array(outputs[j], index++)",
        "encoder.set_input_array(outputs[j], index++)",
    ),
    "buffer not bound": Mutant(
        DISPATCH,
        "encoder.set_input_array(scalar(inputs, j), index++);",
        "",
    ),
    "uint where 64 bits are read": Mutant(
        DISPATCH,
        "static_cast<uint64_t>(dispatch.size)",
        "static_cast<uint32_t>(dispatch.size)",
    ),
    "vectors of unaligned outputs": Mutant(DISPATCH, "aligned &= ~(outputs[j]);", ""),
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
        "blocks(tile.columns, columns), blocks(tile.rows, rows),",
        "blocks(tile.rows, rows), blocks(tile.columns, columns),",
    ),
    "tile of another type": Mutant(
        DISPATCH, "beside_g = x.g.source.itemsize()", "beside_g = x.w.source.itemsize()"
    ),
    "threadgroup too large": Mutant(
        DISPATCH,
        "std::min<size_t>(kThreads, kernel->maxTotalThreadsPerThreadgroup())",
        "kThreads",
    ),
    "threadgroup memory too small": Mutant(
        DISPATCH, "columns * kTileStride", "columns * kTileBytes"
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
def changed(file: Path, text: str) -> Iterator[None]:
    """The file with another text, for a while."""
    shipped = file.read_text()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_text(shipped)


def can_see(check: str, mutant: Mutant) -> bool:
    """Whether a check runs what the mutant changes."""
    if check == "mock":
        return mutant.file not in (KERNELS, STEP)
    return mutant.file in (KERNELS, STEP, ROUNDING)


def with_types(text: str) -> str:
    """The header with no other types than TYPES."""
    lines = re.findall(r"^  X\((.*?)\).*\n", text, re.MULTILINE)
    for types in set(lines) - set(TYPES):
        text = re.sub(rf"^  X\({types}\).*\n", "", text, flags=re.MULTILINE)
    return text.replace(f"  X({TYPES[-1]})  \\\n", f"  X({TYPES[-1]})\n")


def run_check(tree: Path, name: str) -> str | None:
    """What a check says against the tree; None if nothing."""
    if name not in ("ASan and UBSan", "TSan"):
        return run_tests(tree, name)
    header = tree / STEP
    with changed(header, with_types(header.read_text())):
        return run_tests(tree, name)


def run_tests(tree: Path, name: str) -> str | None:
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


def table(names: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The table's lines, and whether a check saw the bug."""
    with copy_of_tree() as tree:
        for check in CHECKS:
            if said := run_check(tree, check):
                raise SystemExit(f"{check} fails without any mutant: {said}")
        yield "| Bug | In | First seen by | What it says |", True
        yield "|---|---|---|---|", True
        for name in names:
            mutant = MUTANTS[name]
            file = tree / mutant.file
            with changed(file, mutant.seed(file.read_text())):
                seen = first_to_see(tree, mutant)
            yield (
                f"| {name} | `{Path(mutant.file).name}` | {' | '.join(seen)} |",
                (seen != NOBODY),
            )


def first_to_see(tree: Path, mutant: Mutant) -> tuple[str, str]:
    for check in CHECKS:
        if can_see(check, mutant) and (said := run_check(tree, check)):
            return check, said
    return NOBODY


def digest() -> str:
    """Of the Metal code and of the bugs, comments and spaces aside."""
    text = repr(MUTANTS)
    for file in (KERNELS, STEP, ROUNDING, DISPATCH):
        text += re.sub(r"//.*|\s+", "", (ROOT / file).read_text())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Where the table stands in docs/metal.md, and of what it was taken.
RECORD = re.compile(r"<!-- mutants of (\w*) -->\n(.*?)<!-- end -->\n", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mutants", nargs="*", metavar="MUTANT", help="default: all")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT}")
    arguments = parser.parse_args()
    unknown = set(arguments.mutants) - MUTANTS.keys()
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    if arguments.write and arguments.mutants:
        parser.error("only the whole table can be written")
    taken_of, lines, survivors = digest(), [], []
    for line, seen in table(arguments.mutants or MUTANTS):
        print(line, flush=True)
        lines.append(line)
        survivors += [] if seen else [line]
    for line in survivors:
        print(f"survives: {line}", file=sys.stderr)
    if arguments.write and not survivors:
        document = ROOT / DOCUMENT
        record = (
            f"<!-- mutants of {taken_of} -->\n{chr(10).join(lines)}\n<!-- end -->\n"
        )
        text = RECORD.sub(lambda _: record, document.read_text())
        document.write_text(text)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
