"""Measures a step with other constants in metal/adadelta_step.h.

Changes one value at a time in a copy of this tree, builds the copy and runs its
scripts/bench on the GPU. A value that is faster here by more than the spread, in
every case, on more than one chip, deserves to be the default.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = "metal/adadelta_step.h"
CANDIDATES = {
    "kElementsPerThread": (8, 16),
    "kThreads": (128, 512, 1024),
    "kTileBytes": (256,),
}


def set_constant(text: str, name: str, value: int) -> str:
    """The header's text with another value of one constant."""
    changed, count = re.subn(rf"(\b{name} = )\d+", rf"\g<1>{value}", text)
    if count != 1:
        raise ValueError(f"{HEADER} must set {name} once but does {count} times")
    return changed


def measure(tree: Path, arguments: list[str]) -> str:
    """The share of the limit in each case, with the tree as it is."""
    command = ["bash", str(tree / "scripts/bench"), "--device", "gpu"]
    command += ["--case", "large,transformer", "--contender", "ours"]
    command += ["--out", str(tree / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: scripts/bench failed:\n{done.stderr}")
    cases = json.loads((tree / "out" / "bench.json").read_text())["cases"]
    shown = "{name} {median:.3f} ({q1:.3f} to {q3:.3f})"
    return ", ".join(
        shown.format(name=x["name"], **x["results"]["ours"]["of_limit"]) for x in cases
    )


def main(arguments: list[str]) -> None:
    shipped = (ROOT / HEADER).read_text()
    settings = {"as shipped": shipped}
    for name, values in CANDIDATES.items():
        for value in values:
            settings[f"{name} = {value}"] = set_constant(shipped, name, value)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "out", "dist")
        shutil.copytree(ROOT, tree, ignore=ignored)
        for label, text in settings.items():
            (tree / HEADER).write_text(text)
            print(f"{label}: {measure(tree, arguments)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
