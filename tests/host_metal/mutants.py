"""Seeds bugs in the Metal code, one at a time, and shows which check sees each.

    python tests/host_metal/mutants.py [--write] [MUTANT]...

Works on a copy of the tree, with the Python it is run by (the package and its
`test` extra installed). Prints a Markdown table, or writes it into docs/metal.md
with a digest of the sources; a bug that no check sees is an error. Takes ten
minutes on two cores; names of mutants narrow it down.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOBODY = ("", "")
TIMEOUT = 600  # seconds

ENTRIES = "metal/adadelta.metal"
KERNELS = "metal/update.h"
STEP = "metal/adadelta_step.h"
ROUNDING = "metal/rounding.h"
NORM = "metal/norm.metal"
KERNEL_FILES = (ENTRIES, KERNELS, STEP, ROUNDING, NORM)
ANY_LAYOUT = "metal/any_layout.h"
ROAD = "python/mlx_adadelta/metal_road.py"
DISPATCH = "csrc/eval_metal.cpp"
LAYOUT = "csrc/layout.cpp"
DOCUMENT = "docs/metal.md"

# What the kernels' checks compile: the kernels of all types are one template.
TYPES = tuple(", ".join([name] * 3) for name in ("float32", "float16", "bfloat16"))
# Who may see a bug in the kernels, in this order, and in the rest.
KERNEL_CHECKS = {
    "tests/metal/test_metal_language.py": "language",
    "tests/metal/test_metal_count.py": "count",
    "tests/metal/test_metal_kernels.py": "ASan and UBSan",
    "tests/metal/test_metal_norm.py": "ASan and UBSan",
}
KERNEL_TESTS = (
    "shipped or metal_count or ((metal_kernels or metal_norm) "
    "and not tsan and not contracted and not flushed)"
)
MOCK_CHECKS = [
    *["tests/metal/test_metal_dispatch.py", "tests/update/test_functional.py"],
    *["tests/update/test_layout.py", "tests/update/test_rounding.py"],
    *["tests/update/test_skip.py", "tests/update/test_gradients.py"],
]
MOCK_TESTS = "test_metal_dispatch or (host-metal and not metal-road)"
ROAD_CHECKS = ["tests/metal/test_metal_road.py", "tests/update/test_transforms.py"]
ROAD_TESTS = "(test_metal_road or metal-road) and not extensions"

# What a failed check says, best first, and how the table puts it.
REASONS = {
    r"AddressSanitizer: ([\w-]+)": r"\1",
    r"runtime error: ([^\n]+)": r"\1",
    r"\[host Metal\] ([^\n]+)": r"\1",
    r"(a lane returned before a barrier)": r"\1",
    r"(a barrier that orders no threadgroup memory)": r"\1",
    r"(threadgroup memory is too small)": r"\1",
    r"error: ([^\n\[]+)": r"\1",
    r"assert \['([^']+)'": r"\1",
    r"Mismatched elements|elements differ|nan location": "wrong values",
    r"\n(?:E +)?AssertionError: (\w[^\n]*)": r"\1",
    r"\nE +(assert [^\n]+)": r"\1",
    r"\nE +(?:\w+)?Error: ([^\n]+)": r"\1",
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
    "linear: all elements wherever one is": Mutant(
        KERNELS, "x.whole = begin + N <= n;", "x.whole = begin < n;"
    ),
    "linear: tail left out": Mutant(
        KERNELS, "!x.whole && at < n ? static_cast<uint>(n - at) : 0", "0"
    ),
    "linear: threads overlap": Mutant(
        KERNELS, "lanes * N + lane * N", "lanes * N + lane * N - (lane > 0)"
    ),
    "linear: groups counted in 32 bits": Mutant(
        KERNELS, "static_cast<uint64_t>(group) * lanes * N", "group * lanes * N"
    ),
    "linear: the tail's elements turned": Mutant(
        KERNELS,
        "run[i % kRun] = from[i / kRun][i % kRun];",
        "run[i % kRun] = from[i / kRun][runs.left[i / kRun] - 1 - i % kRun];",
    ),
    "tile: no barrier": Mutant(
        KERNELS, "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);", ""
    ),
    "tile: barrier without memory": Mutant(
        KERNELS, "mem_flags::mem_threadgroup", "mem_flags::mem_none"
    ),
    "tile: early return": Mutant(
        KERNELS,
        "x.whole = rows_left >= rows",
        "if (lane >= rows_left) return; x.whole = rows_left >= rows",
    ),
    "tile: read without turning": Mutant(
        KERNELS,
        "staged[c * stride + x.runs.line[i / kRun]]",
        "staged[x.runs.line[i / kRun] * stride + c]",
    ),
    "tile: no bound check on lines": Mutant(
        KERNELS, "runs.line[r] < lines &&", "lines > 0 &&"
    ),
    "tile: no bound check in a line": Mutant(KERNELS, "&& runs.start < elements", ""),
    "tile: whole by its rows alone": Mutant(KERNELS, "&& columns_left >= columns", ""),
    "tile: batch ignored": Mutant(KERNELS, "group.z * tile.batch_stride +", ""),
    "tile: gaps ignored": Mutant(
        KERNELS, "tile.column_stride, columns_left", "tile.rows, columns_left"
    ),
    "tile: column stride of 31 bits in a tile": Mutant(
        KERNELS,
        "tile.column_stride, columns_left",
        "static_cast<int32_t>(tile.column_stride), columns_left",
    ),
    "tile: column stride of 31 bits between tiles": Mutant(
        KERNELS,
        "column * tile.column_stride",
        "column * static_cast<int32_t>(tile.column_stride)",
    ),
    "tile: rows counted in 32 bits": Mutant(
        KERNELS, "group.z * uint64_t{tile.rows} + row", "group.z * tile.rows + row"
    ),
    "tile: lines counted in 32 bits": Mutant(
        KERNELS,
        "line * stride + runs.start",
        "static_cast<uint>(line * stride) + runs.start",
    ),
    "tile: wider than its memory": Mutant(
        KERNELS,
        "stride = kTileStride / sizeof(G)",
        "stride = kTileStride / sizeof(G) + 1",
    ),
    "tile: some of a thread's elements": Mutant(
        KERNELS,
        "R = rows * columns / (kTileThreads * kRun)",
        "R = rows * columns / (kTileThreads * kRun) / 2 + 1",
    ),
    "v and u swapped": Mutant(
        STEP, "{w - lr * d, new_v, new_u}", "{w - lr * d, new_u, new_v}"
    ),
    "old v under the root": Mutant(STEP, "(new_v + p.eps)", "(v + p.eps)"),
    "half on the way": Mutant(
        KERNELS,
        "static_cast<float>(x.u[r][k]),",
        "static_cast<float>(static_cast<half>(static_cast<float>(x.u[r][k]))),",
    ),
    "writes the old u": Mutant(
        KERNELS, "x.u[r][k] = static_cast<S>(next.u);", "(void)next.u;"
    ),
    "skip ignored": Mutant(KERNELS, "else if (!given.skip)", "else"),
    "scale ignored": Mutant(
        STEP, "p.sign * gradient_scale * g", "p.sign * g + 0 * gradient_scale"
    ),
    "a store before the last load": Mutant(
        KERNELS,
        "read<true>(given.u, x.runs, x.u);",
        "write<true>(x.w, x.runs, given.w_out); read<true>(given.u, x.runs, x.u);",
    ),
    "elements one by one": Mutant(
        KERNELS,
        "write<true>(x.u, x.runs, given.u_out);",
        "for (uint i = 0; i < R * kRun; ++i) "
        "given.u_out[x.runs.begin[i / kRun] + i % kRun] = x.u[i / kRun][i % kRun];",
    ),
    "a branch on a scalar for each element": Mutant(
        KERNELS,
        "const uint k = i % kRun;",
        "const uint k = i % kRun; if (given.lr == 0.0f) continue;",
    ),
    "64 bits an element": Mutant(
        KERNELS,
        "hash_place(add_high(keys.place, high), low, low < begin)",
        "hash_place(keys.place, low, "
        "0 * high + static_cast<uint>((x.runs.begin[r] + k) >> 32))",
    ),
    "threadgroup memory as the device's": Mutant(
        KERNELS, "threadgroup G* staged, uint3", "device G* staged, uint3"
    ),
    "two buffers with one index": Mutant(
        ENTRIES,
        "constant uint64_t& n [[buffer(12)]]",
        "constant uint64_t& n [[buffer(11)]]",
    ),
    # ------------------------------ The norm ------------------------------
    "norm: all elements wherever one is": Mutant(
        NORM, "begin + lanes * kNormElements <= n", "begin < n"
    ),
    "norm: the last element left out": Mutant(
        NORM, "i < static_cast<uint>(n - begin)", "i + 1 < static_cast<uint>(n - begin)"
    ),
    "norm: threads overlap": Mutant(NORM, "(i * lanes + lane) * kRun", "i + lane"),
    "norm: groups counted in 32 bits": Mutant(
        NORM,
        "static_cast<uint64_t>(group) * lanes * kNormElements",
        "group * lanes * kNormElements",
    ),
    "norm: no barrier after the sums": Mutant(
        NORM,
        "= sum.low; metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);",
        "= sum.low;",
    ),
    "norm: no barrier between the pairs": Mutant(
        NORM,
        "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup); n = kept;",
        "n = kept;",
    ),
    "norm: the odd sum of a round dropped": Mutant(
        NORM, "kept = (n + 1) / 2", "kept = n / 2"
    ),
    "norm: every gradient's sums in one place": Mutant(
        NORM, "sums[2 * (first + group) + 1]", "sums[2 * group + 1]"
    ),
    "norm: the two sums swapped": Mutant(
        NORM,
        "sum.high = shared[0]; sum.low = shared[lanes];",
        "sum.high = shared[lanes]; sum.low = shared[0];",
    ),
    "norm: what is rounded off forgotten": Mutant(
        NORM, "sum.low + lost.low", "sum.low + 0.0f * lost.low"
    ),
    "norm: one scale": Mutant(NORM, "ADADELTA_SQRT(sum.high) / kHigh", "sum.low"),
    "norm: infinities lost": Mutant(NORM, "sum.high <= kLargest ? 0.0f", "true ? 0.0f"),
    # ------------------------------ Rounding ------------------------------
    "bits: upper half of the index dropped": Mutant(
        KERNELS, "add_high(keys.place, high)", "add_high(keys.place, 0 * high)"
    ),
    "bits: no carry into the upper half": Mutant(KERNELS, "low, low < begin", "low, 0"),
    "bits: one for all of a run": Mutant(KERNELS, "low = begin + k", "low = begin"),
    "bits: v's for u": Mutant(
        KERNELS, "keys.u + hash * kFactorU", "keys.v + hash * kFactorV"
    ),
    "bits: the step ignored": Mutant(STEP, "static_cast<uint32_t>(step),", "0,"),
    "bits: a round of Philox less": Mutant(ROUNDING, "round < 10", "round < 9"),
    "bits: a weaker hash": Mutant(ROUNDING, "hash ^ hash >> 15", "hash"),
    "rounding to bfloat16: always down": Mutant(
        ROUNDING,
        "(bits_of(x) + (random >> 16)) >> 16",
        "(bits_of(x) + 0 * random) >> 16",
    ),
    "rounding to float16: subnormal numbers down": Mutant(
        ROUNDING, "whole + up", "whole + 0 * up"
    ),
    "rounding to float16: no infinity": Mutant(
        ROUNDING, "rounded < 0x7C00u ?", "rounded < 0xFFFFu ?"
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
        "static_cast<uint64_t>(dispatch.size), 12",
        "static_cast<uint32_t>(dispatch.size), 12",
    ),
    "another struct": Mutant(
        DISPATCH,
        "encoder.set_bytes(x.tile, 12);",
        "encoder.set_bytes(params_[i], 12);",
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
        DISPATCH, "keep_temporary(device, stream(), std::move(copy));", "(void)copy;"
    ),
    "norm: sums of all gradients in one place": Mutant(
        DISPATCH, "first += dispatch.grid.width", "first += 0 * dispatch.grid.width"
    ),
    "norm: sums too short": Mutant(
        DISPATCH, "groups += dispatch.grid.width", "groups = dispatch.grid.width"
    ),
    "norm: sums not kept": Mutant(DISPATCH, "keep(sums);", ""),
    "norm: a barrier between gradients": Mutant(
        DISPATCH, "auto context = encoder.start_concurrent();", ""
    ),
    "norm: an odd layout read as it lies": Mutant(
        DISPATCH, "make_dense(x, stream(), keep)", "x"
    ),
    "library without a hash": Mutant(
        "csrc/metal_source.cpp.in",
        "mlx_adadelta_@MLX_ADADELTA_METAL_HASH@",
        "mlx_adadelta",
    ),
    "header not embedded": Mutant("CMakeLists.txt", '"${header_source}"', '""'),
    "memory too small": Mutant(LAYOUT, "malloc(x.nbytes())", "malloc(x.nbytes() / 2)"),
    # --------------------------- Metal's other road ---------------------------
    "road: axes merged that lie apart": Mutant(
        ANY_LAYOUT,
        "axes.columns.stride == next.length * next.stride",
        "axes.columns.stride >= next.length * next.stride",
    ),
    "road: four axes taken for three": Mutant(
        ANY_LAYOUT, "axes.more || axes.batch.length > 1", "axes.more"
    ),
    "road: any stride is linear": Mutant(
        ANY_LAYOUT, "&& axes.columns.stride == 1;", ";"
    ),
    "road: any rows are transposed": Mutant(
        ANY_LAYOUT, "axes.rows.length > 1 && axes.rows.stride == 1", "true"
    ),
    "road: a tile for each threadgroup": Mutant(
        ANY_LAYOUT, "i += groups", "i += tiles"
    ),
    "road: no barrier between tiles": Mutant(
        ANY_LAYOUT, "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);", ""
    ),
    "road: tiles of the batch left out": Mutant(
        ANY_LAYOUT, "down * across * axes.batch.length", "down * across"
    ),
    "road: writes behind the end": Mutant(ANY_LAYOUT, "begin + r < n ? 1 : 0", "1"),
    "road: a run of the gradient for each element": Mutant(
        ANY_LAYOUT, "place_of(begin + r, shape", "r + place_of(begin, shape"
    ),
    "road: the gradient is copied": Mutant(
        ROAD, "inputs=[dense[0], g,", "inputs=[dense[0], mx.contiguous(g),"
    ),
    "road: w, v and u as they lie": Mutant(
        ROAD, "[mx.contiguous(x) for x in (w,", "[x for x in (w,"
    ),
    "road: v and u swapped": Mutant(ROAD, '"v", "u", "lr"', '"u", "v", "lr"'),
    "road: one threadgroup short": Mutant(ROAD, "-(-w.size //", "(w.size //"),
    "road: a kernel for too few elements": Mutant(ROAD, "FEWEST = 8", "FEWEST = 7"),
    "road: one name for all types": Mutant(
        ROAD, '("adadelta", *names, digest)', '("adadelta", digest)'
    ),
    "road: the kernel asked for its derivative": Mutant(
        ROAD, "(mx.stop_gradient(x) for x in inputs)", "inputs"
    ),
    "road: decay everywhere": Mutant(
        ROAD, 'decay if decays == "coupled"', "decay if 1"
    ),
    "road: one tensor's random bits": Mutant(ROAD, "seed, index),", "seed, 0),"),
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


def with_types(text: str) -> str:
    """The header with no other types than TYPES."""
    lines = re.findall(r"^  X\((.*?)\).*\n", text, re.MULTILINE)
    for types in set(lines) - set(TYPES):
        text = re.sub(rf"^  X\({types}\).*\n", "", text, flags=re.MULTILINE)
    return re.sub(rf"(X\({TYPES[-1]}\)) +\\", r"\1", text)


# What is run for a mutant, by the kind of its file: files, and which of their tests.
CHECKS = {
    "kernels": ([*KERNEL_CHECKS], KERNEL_TESTS),
    "mock": (MOCK_CHECKS, MOCK_TESTS),
    "road": (ROAD_CHECKS, ROAD_TESTS),
}


def run_checks(tree: Path, kind: str) -> tuple[str, str]:
    """The first check to say something against a tree, and what; NOBODY if none."""
    files, tests = CHECKS[kind]
    # The package is the tree's, too, which has no extension and warns of it.
    package = os.pathsep.join([str(tree / "python"), *sys.path[1:]])
    python = [sys.executable, *(["-S"] if kind == "road" else [])]
    pytest = [*python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    pytest += ["-W", "ignore:mlx_adadelta runs on plain:RuntimeWarning"]
    try:
        done = subprocess.run(
            [*pytest, *files, "-k", tests],
            cwd=tree,
            env={**os.environ, **({"PYTHONPATH": package} if kind == "road" else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "a test", "hangs"
    if done.returncode == 0:
        return NOBODY
    failed = re.search(r"^FAILED ([\w/.]+)", done.stdout, re.MULTILINE)
    if failed is None and done.returncode < 0:
        return "a test" if kind == "kernels" else kind, "ends the process"
    if failed is None:
        raise SystemExit(f"the checks cannot run:\n{done.stdout}")
    check = KERNEL_CHECKS.get(failed[1], kind)
    for pattern, reason in REASONS.items():
        if match := re.search(pattern, done.stdout):
            said = match.expand(reason).strip().replace("|", "/")[:60]
            return check, said
    return check, "fails"


def see(names: list[str], kind: str) -> dict[str, tuple[str, str]]:
    """What run_checks finds of each bug."""
    seen: dict[str, tuple[str, str]] = {}
    if not names:
        return seen
    with copy_of_tree() as tree:
        if kind == "kernels":
            header = tree / STEP
            header.write_text(with_types(header.read_text()))
        said = run_checks(tree, kind)
        if said != NOBODY:
            raise SystemExit(f"without any bug: {': '.join(said)}")
        for name in names:
            file = tree / MUTANTS[name].file
            shipped = file.read_text()
            file.write_text(MUTANTS[name].seed(shipped))
            seen[name] = run_checks(tree, kind)
            file.write_text(shipped)
            print(f"{name}: {': '.join(seen[name])}", file=sys.stderr, flush=True)
    return seen


def table(names: list[str]) -> tuple[list[str], list[str]]:
    """The table's lines, and the bugs that no check sees."""
    ours = [n for n in names if MUTANTS[n].file in KERNEL_FILES]
    road = [name for name in names if MUTANTS[name].file in (ANY_LAYOUT, ROAD)]
    others = [name for name in names if name not in (*ours, *road)]
    seen: dict[str, tuple[str, str]] = {}
    with ThreadPoolExecutor() as pool:
        groups = (ours[::2], ours[1::2], others, road)
        for found in pool.map(see, groups, ("kernels", "kernels", "mock", "road")):
            seen |= found
    lines = ["| Bug | In | First seen by | What it says |", "|---|---|---|---|"]
    for name in names:
        file = Path(MUTANTS[name].file).name
        lines.append(f"| {name} | `{file}` | {' | '.join(seen[name])} |")
    return lines, [name for name in names if seen[name] == NOBODY]


def digest() -> str:
    """Of the Metal code and of the bugs, comments and spaces aside."""
    text = repr(MUTANTS)
    for file in (*KERNEL_FILES, ANY_LAYOUT, DISPATCH):
        text += re.sub(r"//.*|\s+", "", (ROOT / file).read_text())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def commit() -> str:
    """The last one that changed the Metal code."""
    command = ["git", "log", "-1", "--format=%h", "--", "metal", DISPATCH]
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


# Where the table stands in docs/metal.md, and of what it was taken.
RECORD = re.compile(
    r"<!-- mutants of (\w+) -->\nTaken at commit \w+\.\n\n(.*?)<!-- end -->\n",
    re.DOTALL,
)


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
    taken_of, taken_at = digest(), commit()
    lines, survivors = table(arguments.mutants or list(MUTANTS))
    print("\n".join(lines))
    for name in survivors:
        print(f"survives: {name}", file=sys.stderr)
    if arguments.write and not survivors:
        document = ROOT / DOCUMENT
        record = f"<!-- mutants of {taken_of} -->\nTaken at commit {taken_at}.\n\n"
        record += "\n".join([*lines, "<!-- end -->", ""])
        document.write_text(RECORD.sub(lambda _: record, document.read_text()))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
