"""Says what is wrong with how extensions link and with paths in wheels.

    python scripts/check_wheel.py WHEEL...

check-wheel-contents checks which files a wheel holds; auditwheel and delocate check its
tags. Needs lief, and no installed mlx-adadelta.
"""

import re
import sys
import zipfile
from pathlib import Path

import lief

lief.logging.disable()  # this script reports odd files itself

EXTENSION = re.compile(r"mlx_adadelta/mlx-[^/]+/_ext\..+\.so")
METALLIB = "mlx_adadelta/mlx_adadelta.metallib"
# A path of the machine that built the wheel, in text or in machine code. The system's
# own libraries are in the same place on every machine.
ABSOLUTE = re.compile(rb"(?<![\w.:/@>$-])/(?:[\w.+@ -]{2,}/){2,}[\w.+@-]*")
SYSTEM = ("/usr/lib/", "/System/Library/")
LINUX = re.compile(r"lib(stdc\+\+|m|gcc_s|c|pthread|dl)\.so\.\d+|ld-linux.*")


def check_extension(data: bytes) -> list[str]:
    """Checks libraries and rpath: they must lead to MLX's own library."""
    binary = lief.parse(data)
    if isinstance(binary, lief.ELF.Binary):
        libmlx, rpath = "libmlx.so", "$ORIGIN/../../mlx/lib"
        linked = [str(x) for x in binary.libraries if not LINUX.fullmatch(str(x))]
        entry = lief.ELF.DynamicEntryRunPath
        rpaths = [x.runpath for x in binary.dynamic_entries if isinstance(x, entry)]
    elif isinstance(binary, lief.MachO.Binary):
        libmlx, rpath = "@rpath/libmlx.dylib", "@loader_path/../../mlx/lib"
        load = lief.MachO.LoadCommand.TYPE.LOAD_DYLIB
        linked = [str(x.name) for x in binary.libraries if x.command == load]
        linked = [name for name in linked if not name.startswith(SYSTEM)]
        rpaths = [x.path for x in binary.rpaths]
    else:
        return ["the extension must be a shared library"]
    wrong = []
    if linked != [libmlx]:
        wrong.append(
            f"the extension must link {libmlx} and the system's but has {linked}"
        )
    if rpaths != [rpath]:
        wrong.append(f"the extension's rpath must be {rpath} but is {rpaths}")
    return wrong


def check_paths(name: str, data: bytes) -> list[str]:
    system = tuple(map(str.encode, SYSTEM))
    found = {x for x in ABSOLUTE.findall(data) if not x.startswith(system)}
    return [f"{name} holds the path {path.decode()}" for path in sorted(found)]


def check_wheel(path: Path) -> list[str]:
    """Lists the faults of a wheel."""
    with zipfile.ZipFile(path) as wheel:
        files = {x: wheel.read(x) for x in wheel.namelist()}
    wrong = [line for name, data in files.items() for line in check_paths(name, data)]
    for name, data in files.items():
        if EXTENSION.fullmatch(name):
            wrong += check_extension(data)
        elif "libmlx" in name:
            wrong.append(f"{name} is a bundled library")
    if not any(map(EXTENSION.fullmatch, files)):
        wrong.append("the native extension is missing")
    if "macosx" in path.name and METALLIB not in files:
        wrong.append(f"{METALLIB} is missing")
    return wrong


if __name__ == "__main__":
    faults = {path: check_wheel(Path(path)) for path in sys.argv[1:]}
    for path, wrong in faults.items():
        print(f"{path}: {'refused' if wrong else 'as it should be'}")
        for line in wrong:
            print(f"  {line}")
    sys.exit(any(faults.values()))
