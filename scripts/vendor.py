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
    *("LICENSE", "CMakeLists.txt"),
    *("csrc/**/*.cpp", "csrc/**/*.h", "csrc/*.in", "metal/*.metal", "metal/*.h"),
    *("python/mlx_adadelta/*.py", "python/mlx_adadelta/py.typed"),
)


class VendorError(Exception):
    """What is wrong, for the person who runs this."""


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sources() -> list[str]:
    return sorted(
        path.relative_to(ROOT).as_posix()
        for pattern in PATTERNS
        for path in ROOT.glob(pattern)
    )


def version() -> str:
    text = (ROOT / "python/mlx_adadelta/__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise VendorError("python/mlx_adadelta/__init__.py has no __version__")
    return found[1]


def git(*arguments: str) -> str | None:
    """Its output; None where there is no git or this is no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def commit(files: list[str]) -> str:
    head = git("rev-parse", "HEAD")
    if head is None or not (ROOT / ".git").exists():
        return "unknown"
    changed = git("status", "--porcelain", "--", *files)
    return head.strip() + (" with local changes" if changed else "")


def read_manifest(destination: Path) -> dict[str, str]:
    """The files of a copy and their checksums."""
    try:
        files: dict[str, str] = json.loads((destination / MANIFEST).read_text())[
            "files"
        ]
    except FileNotFoundError:
        raise VendorError(f"{destination} has no {MANIFEST}: not a copy") from None
    except (ValueError, KeyError, TypeError) as error:
        raise VendorError(f"{destination / MANIFEST} is damaged: {error}") from None
    return files


def find_drift(destination: Path) -> list[str]:
    """How a copy differs from what was copied."""
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
        drift = find_drift(destination)
        if drift:
            raise VendorError(
                "\n".join([f"{destination} was changed since it was made:", *drift])
            )
        shutil.rmtree(destination)
    files = sources()
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
    parser.add_argument(
        "--check", action="store_true", help="tell what was changed in the copy"
    )
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
