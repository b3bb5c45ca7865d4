"""Says what is wrong with the extension, the paths and the versions in wheels.

    python scripts/check_wheel.py WHEEL...

check-wheel-contents checks which files a wheel holds; auditwheel and delocate check its
tags. Needs lief and packaging, and no installed mlx-adadelta.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import lief
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

lief.logging.disable()  # this script reports odd files itself

EXTENSION = re.compile(r"mlx_adadelta/mlx-[^/]+/_ext\.cpython-(\d+)-.+\.so")
MACOS = "14.0"  # the minimum of MLX's own wheels
# A path of the machine that built the wheel, in text or in machine code. The system's
# own libraries are in the same place on every machine.
ABSOLUTE = re.compile(rb"(?<![\w.:/@>$-])/(?:[\w.+@ -]{2,}/){2,}[\w.+@-]*")
SYSTEM = ("/usr/lib/", "/System/Library/")
LINUX = re.compile(r"lib(stdc\+\+|m|gcc_s|c|pthread|dl)\.so\.\d+|ld-linux.*")


def check_linking(binary: lief.Binary, libmlx: str, origin: str) -> list[str]:
    """Checks libraries and rpath: they must lead to MLX's own library."""
    if isinstance(binary, lief.ELF.Binary):
        linked = [str(x) for x in binary.libraries if not LINUX.fullmatch(str(x))]
        runpaths = (lief.ELF.DynamicEntryRunPath, lief.ELF.DynamicEntryRpath)
        rpaths = [
            getattr(x, "runpath", None) or getattr(x, "rpath", "")
            for x in binary.dynamic_entries
            if isinstance(x, runpaths)
        ]
    else:
        load = lief.MachO.LoadCommand.TYPE.LOAD_DYLIB
        linked = [x.name for x in binary.libraries if x.command == load]
        linked = [name for name in linked if not name.startswith(SYSTEM)]
        rpaths = [x.path for x in binary.rpaths]
    wrong = []
    if linked != [libmlx]:
        wrong.append(
            f"the extension must link {libmlx} and the system's but has {linked}"
        )
    if rpaths != [f"{origin}/../../mlx/lib"]:
        wrong.append(
            f"the extension's rpath must be {origin}/../../mlx/lib but is {rpaths}"
        )
    return wrong


def check_extension(python: str, data: bytes, tag: Tag) -> list[str]:
    """Checks which Python and system it is for, and how it links."""
    wrong = []
    if tag.interpreter != f"cp{python}":
        wrong.append(f"the extension is for cp{python}, the wheel for {tag}")
    binary = lief.parse(data)
    if isinstance(binary, lief.ELF.Binary) and "linux" in tag.platform:
        return wrong + check_linking(binary, "libmlx.so", "$ORIGIN")
    if isinstance(binary, lief.MachO.Binary) and tag.platform.startswith("macosx"):
        minimum = ".".join(map(str, binary.build_version.minos[:2]))
        tagged = ".".join(tag.platform.split("_")[1:3])
        if not minimum == tagged == MACOS:
            wrong.append(
                f"the extension needs macOS {minimum}, the wheel says {tagged}, "
                f"MLX needs {MACOS}"
            )
        return wrong + check_linking(binary, "@rpath/libmlx.dylib", "@loader_path")
    return [*wrong, f"the extension is {binary and binary.format}, not {tag.platform}"]


def check_requirement(metadata: bytes) -> list[str]:
    fields = BytesParser().parsebytes(metadata).get_all("Requires-Dist", [])
    runtime = [x for x in map(Requirement, fields) if x.marker is None]
    if [x.name for x in runtime] != ["mlx"]:
        found = ", ".join(map(str, runtime)) or "nothing"
        return [f"METADATA must require mlx alone but requires {found}"]
    if [x.operator for x in runtime[0].specifier] != [">="]:
        return [f"METADATA must require mlx from a release on but has {runtime[0]}"]
    return []


def check_paths(name: str, data: bytes) -> list[str]:
    system = tuple(map(str.encode, SYSTEM))
    found = {x for x in ABSOLUTE.findall(data) if not x.startswith(system)}
    return [f"{name} holds the path {path.decode()}" for path in sorted(found)]


def check_wheel(path: Path) -> list[str]:
    """Lists the faults of a wheel."""
    tag = sorted(parse_wheel_filename(path.name)[3], key=str)[0]
    with zipfile.ZipFile(path) as wheel:
        files = {x: wheel.read(x) for x in wheel.namelist()}
    wrong, extensions = [], 0
    for file, data in files.items():
        wrong += check_paths(file, data)
        if found := EXTENSION.fullmatch(file):
            extensions += 1
            wrong += check_extension(found[1], data, tag)
        elif "libmlx" in file:
            wrong.append(f"{file} is a bundled library")
        elif file.endswith(".dist-info/METADATA"):
            wrong += check_requirement(data)
    if not extensions:
        wrong.append("the native extension is missing")
    metallib = "mlx_adadelta/mlx_adadelta.metallib"
    if tag.platform.startswith("macosx") and metallib not in files:
        wrong.append(f"{metallib} is missing")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/check_wheel", description="Says what is wrong with wheels."
    )
    parser.add_argument("wheels", metavar="WHEEL", type=Path, nargs="+")
    failed = False
    for path in parser.parse_args().wheels:
        try:
            wrong = check_wheel(path)
        except (InvalidWheelFilename, OSError, zipfile.BadZipFile) as error:
            wrong = [str(error)]
        print(f"{path}: {'refused' if wrong else 'as it should be'}")
        for line in wrong:
            print(f"  {line}")
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
