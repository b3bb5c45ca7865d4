"""Copies what another project needs to build or use this package.

    scripts/vendor DEST            copies, or brings a copy up to date
    scripts/vendor --check DEST    tells what was changed in a copy since

DEST is a folder of its own, such as third_party/mlx_adadelta; see
docs/vendoring.md. Needs nothing but Python.
"""

from __future__ import annotations

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


class VendorError(Exception):
    """A message for the person who runs this."""


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def version() -> str:
    text = (ROOT / "python/mlx_adadelta/__init__.py").read_text()
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def commit(files: list[str]) -> str:
    """The checkout's commit; "unknown" where this is no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", ROOT, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        changed = git("status", "--porcelain", "--", *files)
        return git("rev-parse", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_manifest(destination: Path) -> dict[str, str]:
    """The files of a copy and their checksums."""
    try:
        manifest: dict[str, dict[str, str]] = json.loads(
            (destination / MANIFEST).read_text()
        )
        return manifest["files"]
    except FileNotFoundError:
        raise VendorError(f"{destination} has no {MANIFEST}: not a copy") from None
    except (ValueError, KeyError, TypeError) as error:
        raise VendorError(f"{destination / MANIFEST} is damaged: {error}") from None


def find_drift(destination: Path) -> list[str]:
    """Lists the files of a copy that differ from its manifest."""
    recorded = read_manifest(destination)
    present = {
        path.relative_to(destination).as_posix()
        for path in destination.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    } - {MANIFEST}
    drift = [
        (name, "changed")
        for name in recorded.keys() & present
        if checksum(destination / name) != recorded[name]
    ]
    drift += [(name, "missing") for name in recorded.keys() - present]
    drift += [(name, "extra") for name in present - recorded.keys()]
    return [f"{what:8}{name}" for name, what in sorted(drift)]


def copy(destination: Path) -> None:
    if destination.exists() and any(destination.iterdir()):
        if drift := find_drift(destination):
            lines = [f"{destination} was changed since it was made:", *drift]
            raise VendorError("\n".join(lines))
        shutil.rmtree(destination)
    found = {path for pattern in PATTERNS for path in ROOT.glob(pattern)}
    files = sorted(path.relative_to(ROOT).as_posix() for path in found)
    for name in files:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    manifest = {
        "name": "mlx-adadelta",
        "version": version(),
        "commit": commit(files),
        "files": {name: checksum(destination / name) for name in files},
    }
    (destination / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    print(f"mlx-adadelta {manifest['version']}, {len(files)} files, in {destination}")


def main() -> int:
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
            return 0
        drift = find_drift(arguments.destination)
    except (VendorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(drift) or f"{arguments.destination}: as it was copied")
    return 1 if drift else 0


if __name__ == "__main__":
    sys.exit(main())
