"""Measures a step with other constants in metal/adadelta_step.h.

Changes one value at a time in a copy of this tree, builds the copy and runs its
scripts/bench on the GPU. A value that is faster here by more than the spread, in
every case, on more than one chip, deserves to be the default.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parents[1]
HEADER = "metal/adadelta_step.h"
CANDIDATES = {
    "kElementsPerThread": (8, 16),
    "kThreads": (128, 512, 1024),
    "kTileBytes": (256,),
}
CASES = ("large", "transformer")


def set_constant(text: str, name: str, value: int) -> str:
    """The header's text with another value of one constant."""
    changed, count = re.subn(rf"(\b{name} = )\d+", rf"\g<1>{value}", text)
    if count != 1:
        raise ValueError(f"{HEADER} must set {name} once but does {count} times")
    return changed


def measure(tree: Path, device: str, quick: bool) -> dict[str, dict[str, float]]:
    """Seconds a step of each case with the tree as it is."""
    command = ["bash", str(tree / "scripts/bench"), "--device", device]
    command += ["--case", ",".join(CASES), "--contender", "ours"]
    command += ["--out", str(tree / "out"), *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"scripts/bench failed:\n{done.stderr}")
    record = json.loads((tree / "out" / "bench.json").read_text())
    return {
        case["name"]: case["results"]["ours"]["of_limit"] for case in record["cases"]
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tune", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu", help="default: gpu"
    )
    parser.add_argument("--quick", action="store_true", help="smaller cases")
    options = parser.parse_args(argv)
    if options.device == "gpu" and not mx.metal.is_available():
        parser.error("MLX has no Metal device here; --device cpu tries the rest out")

    shipped = (ROOT / HEADER).read_text()
    settings = [("as shipped", shipped)]
    for name, values in CANDIDATES.items():
        for value in values:
            settings.append((f"{name} = {value}", set_constant(shipped, name, value)))
    console = Console()
    table = Table(title="share of the limit (quartiles)")
    for column in ("setting", *CASES):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "out", "dist")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for label, text in track(settings, "building and measuring", console=console):
            (tree / HEADER).write_text(text)
            found = measure(tree, options.device, options.quick)
            table.add_row(
                label,
                *(
                    "{median:.3f} ({q1:.3f} to {q3:.3f})".format(**found[case])
                    for case in CASES
                ),
            )
    console.print(table)
    console.print(f"{mx.device_info(mx.gpu if options.device == 'gpu' else mx.cpu)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
