"""Merges wheels of this package that were built beside several releases of MLX.

    python scripts/merge_wheels.py FOLDER WHEEL...

Each wheel brings its extension in a folder of its own. The stub and the Metal library
are the last one's. Writes one wheel into FOLDER; needs the package wheel, which makes
its RECORD.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

ANEW = re.compile(r"\.pyi$|\.metallib$|/RECORD$")  # made by each build


def check(wheels: list[Path]) -> None:
    """Exits where two wheels are not of the same source, Python and platform."""
    seen: dict[str, int] = {}
    for wheel in wheels:
        if wheel.name != wheels[0].name:
            sys.exit(f"error: {wheel} must be named {wheels[0].name}")
        with ZipFile(wheel) as archive:
            for file in archive.infolist():
                same = seen.setdefault(file.filename, file.CRC) == file.CRC
                if not same and not ANEW.search(file.filename):
                    sys.exit(f"error: {file.filename} must be the same in each wheel")


def main(folder: str, *wheels: str) -> None:
    check([*map(Path, wheels)])
    tool = [sys.executable, "-m", "wheel"]
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as work:
        for wheel in wheels:
            subprocess.run([*tool, "unpack", wheel, "--dest", work], check=True)
        [union] = Path(work).iterdir()
        subprocess.run([*tool, "pack", union, "--dest-dir", folder], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
