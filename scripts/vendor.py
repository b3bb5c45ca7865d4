"""Copies what another project needs to build or use this package.

    scripts/vendor DEST            copies, or brings a copy up to date
    scripts/vendor --check DEST    tells what was changed in a copy since

DEST is a folder of its own, such as third_party/mlx_adadelta; see
docs/vendoring.md. Needs nothing but Python.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "VENDORED.json"
PATTERNS = (
    *("LICENSE", "CMakeLists.txt", "csrc/*.in", "csrc/*.txt"),
    *("csrc/**/*.cpp", "csrc/**/*.h", "metal/*.metal", "metal/*.h"),
    *("python/mlx_adadelta/*.py", "python/mlx_adadelta/py.typed"),
)


def checksums(folder: Path, *patterns: str) -> dict[str, str]:
    """By name: the SHA-256 of the files in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(x for pattern in patterns for x in folder.glob(pattern))
        if path.is_file() and path.suffix != ".pyc" and path.name != MANIFEST
    }


def commit() -> str:
    """The checkout's commit, with "-dirty" after changes; or "unknown"."""
    if not (ROOT / ".git").exists():
        return "unknown"
    command = ["git", "-C", ROOT, "describe", "--always", "--abbrev=40", "--dirty"]
    # No names of tags. Git refuses where the checkout is another user's.
    done = subprocess.run(
        [*command, "--exclude=*"], stdout=subprocess.PIPE, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def find_drift(destination: Path) -> str:
    """Lists the files of a copy that differ from its manifest."""
    try:
        recorded = json.loads((destination / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{destination} is not a copy: {error!r}") from None
    present = checksums(destination, "**/*")
    lines = []
    for name in sorted(recorded.keys() | present.keys()):
        if name not in present:
            lines.append(f"missing {name}\n")
        elif name not in recorded:
            lines.append(f"extra   {name}\n")
        elif recorded[name] != present[name]:
            lines.append(f"changed {name}\n")
    return "".join(lines)


def copy(destination: Path) -> None:
    if destination.exists() and any(destination.iterdir()):
        if drift := find_drift(destination):
            raise ValueError(f"{destination} was changed since it was made:\n{drift}")
        shutil.rmtree(destination)
    package = (ROOT / "python/mlx_adadelta/__init__.py").read_text()
    manifest = {
        "name": "mlx-adadelta",
        "version": re.findall(r'^__version__ = "(.+)"$', package, re.MULTILINE)[0],
        "commit": commit(),
        "files": checksums(ROOT, *PATTERNS),
    }
    for name in manifest["files"]:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    (destination / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="scripts/vendor", description="Copies this package into another project."
    )
    parser.add_argument("destination", metavar="DEST", type=Path)
    text = "tell what was changed in the copy"
    parser.add_argument("--check", action="store_true", help=text)
    arguments = parser.parse_args()
    try:
        if not arguments.check:
            copy(arguments.destination)
        elif drift := find_drift(arguments.destination):
            print(drift, end="")
            sys.exit(1)
        else:
            print(f"{arguments.destination}: as it was copied")
    except ValueError as error:
        parser.error(str(error))
