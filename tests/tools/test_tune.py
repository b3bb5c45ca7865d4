"""scripts/tune, with a bench that reports what the copy's header says."""

import shutil
from pathlib import Path

from packaging_tools import ROOT, attempt, run

# Stands for scripts/bench: its figure is made from the constants.
BENCH = r"""
header=$(dirname -- "$0")/../metal/adadelta_step.h
value() { sed -n "s/.* $1 = \([0-9]*\).*/\1/p" "$header"; }
echo "not shown where it is compared"
echo "## Against what is shipped"
echo "figure $(value kThreads)-$(value kTileBytes)-$(value kElementsPerThread) $*"
"""


def tree(folder: Path, bench: str) -> Path:
    for name in ("scripts/tune", "scripts/_setup.sh", "metal/adadelta_step.h"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "scripts/bench").write_text(bench)
    run("git", "init", "--quiet", cwd=folder)
    run("git", "add", ".", cwd=folder)
    return folder / "scripts/tune"


def test_each_value_is_built_and_measured(tmp_path: Path) -> None:
    output = run(tree(tmp_path, BENCH), "--quick")
    figures = [x for x in output.splitlines() if x.startswith("figure")]
    # threads, tile, elements: the shipped ones, then one at a time
    assert [x.split()[1] for x in figures] == [
        *("256-128-4", "256-128-8", "256-128-16"),
        *("128-128-4", "512-128-4", "1024-128-4", "256-256-4"),
    ]
    assert all("--device gpu" in x and "--quick" in x for x in figures)
    assert ["--compare" in x for x in figures] == [False, *[True] * 6]
    assert output.count("not shown") == 1
    header = "metal/adadelta_step.h"
    assert (tmp_path / header).read_bytes() == (ROOT / header).read_bytes()


def test_a_constant_that_is_not_there(tmp_path: Path) -> None:
    tune = tree(tmp_path, BENCH)
    header = tmp_path / "metal/adadelta_step.h"
    header.write_text(header.read_text().replace(" kThreads = ", " kOther = "))
    status, output = attempt(tune)
    assert status == 1 and "error: metal/adadelta_step.h must set kThreads" in output


def test_a_bench_that_fails(tmp_path: Path) -> None:
    status, output = attempt(tree(tmp_path, "echo no gpu here >&2; exit 2"))
    assert status == 2 and output.endswith("no gpu here\n")
