"""Seeds bugs in the Metal code, one at a time, and shows which check sees each.

    python tests/host_metal/mutants.py [BUG]...   # of bugs.py

Works on a copy of the tree, with the Python it is run by (the package and its
`test` extra installed). A bug that no check sees is an error. All of them take ten
minutes on two cores and, where each is seen, go on record in docs/metal.md with a
digest of the sources; names of bugs narrow it down.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bugs import BUGS, DOCUMENT, FILES, RECORD, ROOT, digest

TIMEOUT = 600  # seconds
# Which tests may see the bugs of these files, and of the other ones in metal/.
ROAD = ("metal/any_layout.h", "python/mlx_adadelta/metal_road.py")
TESTS = {
    "kernels": """
        tests/metal/test_metal_language.py tests/metal/test_metal_count.py
        tests/metal/test_metal_kernels.py tests/metal/test_metal_norm.py
        -k 'shipped or metal_count or ((metal_kernels or metal_norm)
            and not tsan and not contracted and not flushed)'""",
    "dispatch": """
        tests/metal/test_metal_dispatch.py tests/update/test_functional.py
        tests/update/test_layout.py tests/update/test_rounding.py
        tests/update/test_skip.py tests/update/test_gradients.py
        -k 'test_metal_dispatch or (host-metal and not metal-road)'""",
    "road": """
        tests/metal/test_metal_road.py tests/update/test_transforms.py
        -k '(test_metal_road or metal-road) and not extensions'""",
}
# What the kernels' checks compile: the kernels of all types are one template.
TYPES = " ".join(f"X({x}, {x}, {x})" for x in ("float32", "float16", "bfloat16"))


def kind_of(name: str) -> str:
    if FILES[name] in ROAD:
        return "road"
    return "kernels" if FILES[name].startswith("metal/") else "dispatch"


def run_tests(tree: Path, kind: str) -> str:
    """The first test to fail in a tree, and what it says."""
    # The road's bugs are in the package, too. A tree's has no extension and warns.
    package = os.pathsep.join([str(tree / "python"), *sys.path[1:]])
    pytest = "-S " * (kind == "road") + "-m pytest -q -x -p no:cacheprovider"
    pytest += " -W 'ignore:mlx_adadelta runs on plain:RuntimeWarning' "
    pytest += " ".join(TESTS[kind].split())
    done = subprocess.run(
        [sys.executable, *shlex.split(pytest)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": package},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode < 0:
        return "a crash"
    failed = re.search(r"^FAILED tests/(.*)", done.stdout, re.MULTILINE)
    if done.returncode != 0 and failed is None:
        raise SystemExit(f"the checks cannot run:\n{done.stdout}")
    return failed[1] if failed else ""


def see(names: list[str]) -> dict[str, str]:
    """What sees each of these bugs, which are of one kind."""
    seen: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder, "tree")
        ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out")
        shutil.copytree(ROOT, tree, ignore=ignore)
        wheels = "build/macos-wheels"
        if (ROOT / wheels).exists():
            shutil.copytree(ROOT / wheels, tree / wheels)
        kind = kind_of(names[0])
        if kind == "kernels":
            header = tree / "metal/adadelta_step.h"
            rows = re.compile(r"(  X\(.*\n)+")
            header.write_text(rows.sub(f"  {TYPES}\n", header.read_text()))
        if failed := run_tests(tree, kind):
            raise SystemExit(f"without any bug: {failed}")
        for name in names:
            file = tree / FILES[name]
            shipped = file.read_text()
            file.write_text(BUGS[FILES[name]][name].seed(shipped))
            seen[name] = run_tests(tree, kind)
            file.write_text(shipped)
            print(f"{name}: {seen[name] or 'SURVIVES'}", flush=True)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bugs", nargs="*", metavar="BUG", help="default: all")
    bugs = parser.parse_args().bugs
    taken_of = digest()
    kinds = [[x for x in bugs or FILES if kind_of(x) == kind] for kind in TESTS]
    halves = [names[i::2] for names in kinds for i in (0, 1)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(see, filter(None, halves)))
    seen = {name: test for part in found for name, test in part.items()}
    if survivors := [name for name in seen if not seen[name]]:
        raise SystemExit(f"no check sees: {', '.join(survivors)}")
    if not bugs:
        counts = Counter(test.split("::")[0] for test in seen.values()).most_common()
        text = f"All {len(seen)} are seen. The first to see them are "
        text += ", ".join(f"{test} ({count})" for test, count in counts) + "."
        record = f"<!-- mutants of {taken_of} -->\n{textwrap.fill(text, 92)}\n"
        record += "<!-- end -->\n"
        document = ROOT / DOCUMENT
        document.write_text(RECORD.sub(lambda _: record, document.read_text()))


if __name__ == "__main__":
    main()
