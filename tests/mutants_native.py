"""Seeds bugs in csrc/ and python/, one at a time, and shows which test sees each.

    scripts/mutate [--list] [MUTANT]... > table.md

Works on a copy of the tree, built without optimisation. For each mutant the native
driver runs, then pytest up to the first failure, then the driver under
AddressSanitizer, as in CI. Prints a Markdown table and the share of mutants that were
seen; below 95 % is an error. Takes an hour and a half; names of mutants narrow it down.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from host_metal.mutants import Mutant, copy_of_tree, seeded

TIMEOUT = 900  # seconds; what hangs has been seen too
WANTED = 0.95

CPU = "csrc/eval_cpu.cpp"
LAYOUT = "csrc/layout.cpp"
OP = "csrc/adadelta.cpp"
OPTIMIZER = "python/mlx_adadelta/optimizer.py"
FUNCTION = "python/mlx_adadelta/functional.py"
REFERENCE = "python/mlx_adadelta/reference.py"
NATIVE = "python/mlx_adadelta/_native.py"
MAIN = "python/mlx_adadelta/__main__.py"

# Quick ones first.
TESTS = [
    *["errors", "skip", "options", "optimizer", "throw", "donation", "functional"],
    *["rounding", "transforms", "fallback", "match_layout", "layout", "properties"],
    "limits",
]

# The Metal path on the host, and a test that looks at what is installed.
DESELECTED = "not host-metal and not results_are_the_kernels"

MUTANTS = {
    # ------------------------------ Conversions ------------------------------
    "half widened to twice": Mutant(
        CPU, "* 0x1p-112f;\n  float sub", "* 0x1p-111f;\n  float sub"
    ),
    "subnormal half widened wrong": Mutant(
        CPU, "(126u << 23)) - 0.5f", "(126u << 23))"
    ),
    "sign of a half lost": Mutant(
        CPU, "uint32_t sign = (bits_of(x) >> 16) & 0x8000;", "uint32_t sign = 0;"
    ),
    "infinite half is NaN": Mutant(
        CPU, "magnitude > 0x7f800000 ? 0x7d00", "magnitude >= 0x7f800000 ? 0x7d00"
    ),
    "subnormal half rounded wrong": Mutant(CPU, "0x38800000u)", "0x38000000u)"),
    "ties of a bfloat16 away from zero": Mutant(
        CPU, "(bits + ((bits >> 16) & 1) + 0x7fff)", "(bits + 0x8000)"
    ),
    "NaN not kept in bfloat16": Mutant(
        CPU, "(bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded", "rounded"
    ),
    "stochastic half truncated": Mutant(
        CPU, "round_to_float16(bits_of(x), random)", "round_to_float16(bits_of(x), 0)"
    ),
    # ------------------------------ Linear loop ------------------------------
    "skip ignored": Mutant(CPU, "if (shared.skip) {", "if (false) {"),
    "v not copied when skipped": Mutant(
        CPU, "    std::copy(p.v + begin, p.v + end, p.v_out + begin);\n", ""
    ),
    "u gets v": Mutant(CPU, "narrow<S>(state.u);", "narrow<S>(state.v);"),
    "random bits of another element": Mutant(
        CPU, "adadelta_random(first + i, shared", "adadelta_random(i, shared"
    ),
    "u rounded with v's bits": Mutant(
        CPU, "narrow<S>(state.u, random.x[2])", "narrow<S>(state.u, random.x[1])"
    ),
    "random bits begin anew in each unit": Mutant(
        CPU,
        "      begin,\n      work.shared.read());",
        "      0,\n      work.shared.read());",
    ),
    "last unit left out": Mutant(
        CPU, "(work.elements + kUnit - 1) / kUnit", "work.elements / kUnit"
    ),
    "last unit too long": Mutant(
        CPU, "std::min(kUnit, work.elements - begin)", "kUnit"
    ),
    "one element short": Mutant(
        CPU, "update(p, 0, n, first, shared);", "update(p, 0, n - 1, first, shared);"
    ),
    # --------------------------- Transposed operands --------------------------
    "block turned wrong": Mutant(
        CPU, "2, 10, 3, 11, 6, 14, 7, 15", "2, 10, 3, 11, 6, 14, 15, 7"
    ),
    "block beyond the columns": Mutant(
        CPU,
        "row_ + kBlock <= rows_ && column_ + kBlock <= columns_",
        "row_ + kBlock <= rows_ && column_ <= columns_",
    ),
    "block beyond the rows": Mutant(
        CPU,
        "row_ + kBlock <= rows_ && column_ + kBlock <= columns_",
        "row_ <= rows_ && column_ + kBlock <= columns_",
    ),
    "edge a column short": Mutant(
        CPU,
        "c < std::min(kBlock, columns_ - column_)",
        "c + 1 < std::min(kBlock, columns_ - column_)",
    ),
    "edge a row short": Mutant(
        CPU,
        "r < std::min(kBlock, rows_ - row_)",
        "r + 1 < std::min(kBlock, rows_ - row_)",
    ),
    "blocks past the last row": Mutant(
        CPU, "if (row_ >= rows_) {", "if (row_ > rows_) {"
    ),
    "last block never turned": Mutant(
        CPU, "while (column_ < columns_) {", "while (column_ + kBlock < columns_) {"
    ),
    "two strips in one buffer": Mutant(
        CPU, "next_(strip_ + strip_rows * to_stride_)", "next_(strip_)"
    ),
    "buffer of the operand's own rows": Mutant(
        CPU,
        "next_(strip_ + strip_rows * to_stride_)",
        "next_(strip_ + kStripBytes / sizeof(T) * to_stride_)",
    ),
    "buffer half as large": Mutant(
        CPU, "return 2 * strip_rows * padded", "return strip_rows * padded"
    ),
    "scratch never grows": Mutant(CPU, "if (size < bytes) {", "if (size == 0) {"),
    "strips swapped once only": Mutant(
        CPU, "v.advance(end, next_end);", "v.advance(begin, end);"
    ),
    "random bits begin anew in each row": Mutant(
        CPU,
        "update(line, i, width, first + offset, shared);",
        "update(line, i, width, first, shared);",
    ),
    "row as long as its part": Mutant(
        CPU,
        "size_t offset = row * columns + column;",
        "size_t offset = row * width + column;",
    ),
    "last part of the columns left out": Mutant(
        CPU, "(work.columns + width - 1) / width", "work.columns / width"
    ),
    "last rows left out": Mutant(
        CPU,
        "(work.rows + shift + height - 1) / height",
        "(work.rows + height - 1) / height",
    ),
    "rows begin too late": Mutant(
        CPU, "std::max(row, units.shift) - units.shift", "row"
    ),
    "rows of two units overlap": Mutant(
        CPU,
        "std::min(row + units.height - units.shift, work.rows)",
        "std::min(row + units.height, work.rows)",
    ),
    "first strip too long": Mutant(
        CPU, "row + units.strip_rows - units.shift", "row + units.strip_rows"
    ),
    "v of the first matrix": Mutant(
        CPU, "matrix.v = p.v + batch * tiles.v.batch_stride;", "matrix.v = p.v;"
    ),
    "one matrix of the batch": Mutant(
        CPU, "work.elements / (work.rows * work.columns) * units.across", "units.across"
    ),
    "another matrix": Mutant(
        CPU, "unit / (units.across * units.down)", "unit / units.down"
    ),
    "tiles swapped": Mutant(
        CPU, "{x.g.tile, x.v.tile, x.u.tile}", "{x.g.tile, x.u.tile, x.v.tile}"
    ),
    # --------------------------------- Work ----------------------------------
    "units of another tensor": Mutant(
        CPU, "while (i - first >= work->units) {", "while (i - first > work->units) {"
    ),
    "units miscounted": Mutant(CPU, "first += work->units;", "first += 1;"),
    "nobody waits": Mutant(
        CPU, "job->take_units();\n  job->wait();", "job->take_units();"
    ),
    "outputs of the first": Mutant(
        CPU, "&outputs[3 * i], shared", "&outputs[0], shared"
    ),
    "columns are rows": Mutant(
        CPU, "shared.params.columns = x.columns;", "shared.params.columns = x.rows;"
    ),
    "elements never counted": Mutant(
        CPU, ".counted = params_[0].stochastic != 0", ".counted = false"
    ),
    "copies not kept": Mutant(
        CPU, "encoder.add_temporary(std::move(copy));", "(void)copy;"
    ),
    "cancelled tasks are done": Mutant(CPU, "if (!job->cancel()) {", "if (true) {"),
    "tasks under way are cancelled": Mutant(
        CPU, "if (!job->cancel()) {", "if (false) {"
    ),
    "evaluated again": Mutant(CPU, "if (is_done(outputs)) {", "if (false) {"),
    "all threads or none": Mutant(
        CPU, "some->resize(i);", "some->resize(most_helpers());"
    ),
    "no memory for any strips": Mutant(
        CPU, "scratch(scratch_bytes); // which", "// which"
    ),
    # -------------------------------- Layouts --------------------------------
    "small outputs pin large buffers": Mutant(
        LAYOUT,
        "x.is_donatable() && x.buffer_size() <= x.nbytes() + kDonationSlack",
        "x.is_donatable()",
    ),
    "memory of others reused": Mutant(LAYOUT, "x.is_donatable() &&", "true &&"),
    "axes of length 1 looked at": Mutant(
        LAYOUT, "if (x.shape(i) > 1) {", "if (x.shape(i) > 0) {"
    ),
    "innermost axis first": Mutant(
        LAYOUT, "x.strides(a) > x.strides(b)", "x.strides(a) < x.strides(b)"
    ),
    "axes merged over a gap": Mutant(
        LAYOUT, "== next.length * next.stride", "== next.length"
    ),
    "any stride is linear": Mutant(LAYOUT, "axes[0].stride == 1);", "true);"),
    "batches lie at once": Mutant(LAYOUT, "axes.size() == 3 ? axes[0].stride : 0", "0"),
    "turned w laid anew": Mutant(
        LAYOUT, "dense = is_linear(axes) || turned.rows != 0;", "dense = false;"
    ),
    "empty arrays looked at": Mutant(LAYOUT, "if (w.size() == 0 || ", "if ("),
    "w laid anew without need": Mutant(
        LAYOUT, "dense && demands.counted && !w.flags()", "dense && !w.flags()"
    ),
    "everything is column-contiguous": Mutant(
        LAYOUT,
        "flags.col_contiguous = order.size() <= 1;",
        "flags.col_contiguous = true;",
    ),
    "tiles of two shapes": Mutant(
        LAYOUT, "(rows == 0 || (rows == tile.rows && columns == tile.columns))", "true"
    ),
    "transposed state reused": Mutant(
        LAYOUT, "return {x, false, tile};", "return {x, true, tile};"
    ),
    "inputs not put back": Mutant(LAYOUT, "out->inputs() = inputs_;", "(void)out;"),
    "copies freed while they are made": Mutant(
        LAYOUT, "synchronize(stream); // which may be about to write the copy", ""
    ),
    "traced inputs taken": Mutant(LAYOUT, "&inputs && !out.is_tracer()", "&inputs"),
    "memory never reused": Mutant(LAYOUT, "if (!x->reusable) {", "if (true) {"),
    "memory of v and u swapped": Mutant(
        LAYOUT,
        "{&operands.w, &operands.v, &operands.u};",
        "{&operands.w, &operands.u, &operands.v};",
    ),
    "memory too small": Mutant(
        LAYOUT, "malloc(x->source.nbytes())", "malloc(x->source.nbytes() / 2)"
    ),
    # ------------------------------ The operation -----------------------------
    "shapes not compared": Mutant(
        OP,
        "xs[i].shape() != parameters[i].shape()",
        "xs[i].size() != parameters[i].size()",
    ),
    "integers accepted": Mutant(OP, "!issubdtype(xs[i].dtype(), floating)", "false"),
    "float64 accepted": Mutant(OP, "parameters[i].dtype() == float64", "false"),
    "scalars of any shape": Mutant(OP, "x.ndim() != 0 || issub", "issub"),
    "rho 1 refused": Mutant(OP, "options.rho <= 1)", "options.rho < 1)"),
    "eps 0 accepted": Mutant(OP, "options.eps > 0 &&", "options.eps >= 0 &&"),
    "1 - rho in float": Mutant(
        OP, "static_cast<float>(1.0 - options.rho)", "1.0f - params.rho"
    ),
    "maximize ignored": Mutant(OP, "options.maximize ? -1.0f : 1.0f", "1.0f"),
    "seed cut": Mutant(OP, "options.seed >> 32", "options.seed >> 33"),
    "every tensor the first": Mutant(OP, "static_cast<unsigned int>(tensor);", "0;"),
    "filter ignored": Mutant(
        OP, "options.decays.empty() || options.decays[tensor]", "true"
    ),
    "decay in the wrong place": Mutant(
        OP, "(options.decoupled_weight_decay ?", "(!options.decoupled_weight_decay ?"
    ),
    "gradient's type not compared": Mutant(
        OP, "w == W && g == G && state == S", "w == W && state == S"
    ),
    "group too short": Mutant(
        OP,
        "std::min(begin + kGroupSize, parameters.size())",
        "std::min(begin + kGroupSize - 1, parameters.size())",
    ),
    "index within the group": Mutant(
        OP, "make_params(options, i)", "make_params(options, i - begin)"
    ),
    "u of v's type": Mutant(OP, "take_back(out[2], u[i])", "take_back(out[2], v[i])"),
    "skipped float64 cast": Mutant(
        OP,
        "bool inexact = old.dtype() == float64 && options.skip;",
        "bool inexact = 0;",
    ),
    "state of two types": Mutant(
        OP,
        "v[i].dtype() == u[i].dtype() ? v[i].dtype() : float32",
        "v[i].dtype()",
    ),
    "two types rounded stochastically": Mutant(
        OP, "if (v[i].dtype() != u[i].dtype()) {", "if (false) {"
    ),
    "skip ignored when transformed": Mutant(
        OP,
        "return where(skip, old, astype(updated, old.dtype()));",
        "return astype(updated, old.dtype());",
    ),
    "tangents misplaced": Mutant(
        OP, "all_tangents[argnums[i]] = tangents[i];", "all_tangents[i] = tangents[i];"
    ),
    "cotangents misplaced": Mutant(
        OP, "wanted.push_back(all[i]);", "wanted.push_back(all[wanted.size()]);"
    ),
    "all updates are one": Mutant(
        OP, "return params.size() == params_.size() &&", "return true ||"
    ),
    "shapes of two outputs": Mutant(
        OP,
        "shapes.insert(shapes.end(), 3, inputs[i].shape());",
        "shapes.insert(shapes.end(), 2, inputs[i].shape());",
    ),
    # --------------------------------- Python ---------------------------------
    "Python: rho 1 refused": Mutant(FUNCTION, "0 <= x <= 1,", "0 <= x < 1,"),
    "Python: NaN accepted": Mutant(
        FUNCTION,
        "if not (math.isfinite(number) and accept(number)):",
        "if not accept(number) and number == number:",
    ),
    "Python: bool is a number": Mutant(
        FUNCTION,
        "if not isinstance(value, Real) or isinstance(value, bool):",
        "if not isinstance(value, Real):",
    ),
    "Python: backend on any device": Mutant(
        FUNCTION, 'asked != "auto" and device != wanted', 'asked != "auto" and False'
    ),
    "Python: scale above 1": Mutant(
        FUNCTION, "mx.minimum(largest / (norm + 1e-6), 1.0)", "largest / (norm + 1e-6)"
    ),
    "Python: clipped by the norm alone": Mutant(
        FUNCTION, "largest / (norm + 1e-6)", "largest / norm"
    ),
    "Python: the smallest gradient is finite": Mutant(
        FUNCTION, "mx.abs(g).max()", "mx.abs(g).min()"
    ),
    "Python: parameters always laid anew": Mutant(
        FUNCTION, "order is None or order == _memory_order(parameters)", "order is None"
    ),
    "Python: axes of length 1 looked at": Mutant(
        FUNCTION, "x.shape[axis] > 1 and strides", "strides"
    ),
    "Python: state's type ignored": Mutant(
        FUNCTION,
        "if options.state_dtype is not None or options.decay_filter is not None:",
        "if options.decay_filter is not None:",
    ),
    "Python: step ignored": Mutant(
        FUNCTION,
        "mx.array(step, mx.uint64) if options",
        "mx.array(0, mx.uint64) if options",
    ),
    "Python: stream ignored": Mutant(
        FUNCTION, "stream=stream or device", "stream=device"
    ),
    "Python: no way out for float64": Mutant(
        FUNCTION, "if not any(w.dtype == mx.float64 for w in parameters):", "if True:"
    ),
    "Python: two types rounded stochastically": Mutant(
        FUNCTION, "if v.dtype != u.dtype:", "if False:"
    ),
    "reference: rho in u": Mutant(REFERENCE, "u = rho * u", "u = u"),
    "reference: half rounded with other bits": Mutant(
        REFERENCE, "(random >> 19)", "(random >> 18)"
    ),
    "reference: a Philox constant": Mutant(REFERENCE, "0xBB67AE85", "0xBB67AE86"),
    "reference: seed cut": Mutant(REFERENCE, "seed >> 32)", "0)"),
    "reference: skip ignored": Mutant(REFERENCE, "if skip is not None:", "if False:"),
    "reference: decays swapped": Mutant(
        REFERENCE,
        "if decay and decoupled_weight_decay:",
        "if decay and not decoupled_weight_decay:",
    ),
    "optimizer: step stands still": Mutant(OPTIMIZER, "self.step + 1}", "self.step}"),
    "optimizer: schedule a step ahead": Mutant(
        OPTIMIZER,
        "schedule(self.step))\n            for",
        "schedule(self.step + 1))\n            for",
    ),
    "optimizer: u starts at 1": Mutant(
        OPTIMIZER, 'state["u"] = mx.zeros(', 'state["u"] = mx.ones('
    ),
    "optimizer: state not put back": Mutant(
        OPTIMIZER, "            self.state.update(before)\n", ""
    ),
    "optimizer: initialized though refused": Mutant(
        OPTIMIZER, "            self._initialized = False\n", ""
    ),
    "optimizer: state may hold more": Mutant(
        OPTIMIZER, 'len(state) == 2 and "v" in state', '"v" in state'
    ),
    "optimizer: the first path": Mutant(
        OPTIMIZER, "_path(self.places[i])", "_path(self.places[0])"
    ),
    "optimizer: rows of an array are a tree": Mutant(
        OPTIMIZER, "{} if isinstance(tree, mx.array) else tree", "tree"
    ),
    "optimizer: step goes on though skipped": Mutant(
        OPTIMIZER, "mx.where(stay, self.state[name].astype(x.dtype), x)", "x"
    ),
    "optimizer: options not passed on": Mutant(
        OPTIMIZER,
        "gradient_scale=gradient_scale,\n            skip=skip,\n            backend",
        "gradient_scale=None,\n            skip=skip,\n            backend",
    ),
    "any version of mlx": Mutant(
        NATIVE, "if module.mlx_version != MLX_VERSION:", "if False:"
    ),
    "self check never fails": Mutant(MAIN, "return 0 if healthy else 1", "return 0"),
}

RUN_PYTEST = """
import sys
# The copy's package, not the one that is installed for editing.
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in type(f).__name__
                    and "Redirecting" not in type(f).__name__]
sys.path.insert(0, sys.argv[1] + "/python")
import mlx_adadelta, pytest
assert mlx_adadelta.__file__.startswith(sys.argv[1]), mlx_adadelta.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


class Builder:
    """Compiles what has changed, with tests/native/CMakeLists.txt."""

    def __init__(self, tree: Path, folder: str, flags: str) -> None:
        self.tree = tree
        self.folder = folder
        options = {
            "CMAKE_MAKE_PROGRAM": Path(sys.executable).with_name("ninja"),
            "Python_EXECUTABLE": sys.executable,
            # Half the time of a release build; vector clones would triple it.
            "CMAKE_BUILD_TYPE": "Debug",
            "CMAKE_CXX_FLAGS": f"-g0 -DADADELTA_CLONES= {flags}",
        }
        cmake = [sys.executable, "-m", "cmake", "-G", "Ninja"]
        cmake += ["-S", "tests/native", "-B", folder]
        self.run([*cmake, *(f"-D{k}={x}" for k, x in options.items())])

    def run(self, command: list[str]) -> None:
        done = subprocess.run(
            command, cwd=self.tree, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(done.stdout + done.stderr)

    def build(self, *targets: str) -> None:
        """Brings targets up to date."""
        ninja = [sys.executable, "-m", "ninja", "-C", self.folder, "-j1"]
        self.run([*ninja, *targets])


class Checks:
    """What is run with each mutant, in the order of their cost."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.plain = Builder(tree, "build/mutants", "")
        self.asan = Builder(
            tree,
            "build/mutants-asan",
            "-fsanitize=address,undefined -fno-sanitize-recover=all",
        )

    def first_failure(self, file: str) -> str | None:
        """The first check to fail with this file changed; None if none does."""
        native = file.startswith("csrc/")
        self.plain.build("driver", "mlx_adadelta_module")
        [extension] = (self.tree / "build/mutants").rglob("_ext*.so")
        shutil.copy(extension, self.tree / "python/mlx_adadelta")
        if native and (failed := self.run("driver", ["build/mutants/driver"])):
            return failed
        pytest = [sys.executable, "-c", RUN_PYTEST, str(self.tree)]
        pytest += ["-q", "-x", "-p", "no:cacheprovider", "-k", DESELECTED]
        pytest += [f"tests/test_{name}.py" for name in TESTS]
        if failed := self.run("pytest", pytest):
            return failed
        if native:
            self.asan.build("driver")
            return self.run("driver under ASan", ["build/mutants-asan/driver"])
        return None

    def run(self, name: str, command: list[str]) -> str | None:
        """What the check says if it fails."""
        try:
            done = subprocess.run(
                command,
                cwd=self.tree,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT,
                check=False,
                env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            )
        except subprocess.TimeoutExpired:
            return f"{name} hangs"
        if done.returncode == 0:
            return None
        if found := re.search(r"Sanitizer: ([\w-]+)|runtime error: (.+)", done.stdout):
            return f"{name}: {found[1] or found[2]}"
        if found := re.search(r"FAILED:? (?:tests/)?(.+?)(?: - |: |\n|$)", done.stdout):
            return found[1] if name == "pytest" else f"{name}: {found[1]}"
        if done.returncode < 0 or "Fatal Python error" in done.stdout:
            return f"{name} crashes"
        if "ERROR tests/" in done.stdout or "ImportError" in done.stdout:
            return f"{name} cannot import it"
        raise SystemExit(f"{name} cannot run:\n{done.stdout}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("mutants", nargs="*", metavar="MUTANT", help="default: all")
    parser.add_argument("--list", action="store_true", help="only name them")
    arguments = parser.parse_args()
    names = arguments.mutants or list(MUTANTS)
    if unknown := set(names) - MUTANTS.keys():
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    survivors = []
    with copy_of_tree() as tree:
        for name in names:  # before anything is spent
            with seeded(tree, MUTANTS[name]):
                pass
        if arguments.list:
            print("\n".join(names))
            return 0
        checks = Checks(tree)
        if failed := checks.first_failure(CPU):
            raise SystemExit(f"without any mutant: {failed}")
        print("| Bug | In | Seen by |\n|---|---|---|", flush=True)
        for name in names:
            mutant = MUTANTS[name]
            with seeded(tree, mutant):
                seen = checks.first_failure(mutant.file)
            if seen is None:
                survivors.append(name)
            cell = "**survives**" if seen is None else f"`{seen[:80]}`"
            print(f"| {name} | `{Path(mutant.file).name}` | {cell} |", flush=True)
    share = 1 - len(survivors) / len(names)
    print(f"\n{len(names) - len(survivors)} of {len(names)} seen, {share:.1%}.")
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
