"""Opens wheels of this package and says what is wrong with them.

    python scripts/check_wheel.py WHEEL...

Needs lief and packaging, and no installed mlx-adadelta.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import lief
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

lief.logging.disable()  # of an odd file we say ourselves what is wrong

PACKAGE = "mlx_adadelta"
MODULES = (
    *("__init__", "__main__", "backend", "gradients", "match_layout", "optimizer"),
    *("options", "reference", "tree", "update"),
)
EXTENSION = re.compile(rf"{PACKAGE}/_ext\.cpython-(\d+)-.+\.so")
MACOS = "14.0"  # what MLX's own wheels need at least
# A path of the machine that built it, in text or in machine code; systems' own
# libraries lie in the same place everywhere.
ABSOLUTE = re.compile(rb"(?<![\w.:/@>$-])/(?:[\w.+@ -]{2,}/){2,}[\w.+@-]*")
SYSTEM = ("/usr/lib/", "/System/Library/")
LINUX = re.compile(r"lib(stdc\+\+|m|gcc_s|c|pthread|dl)\.so\.\d+|ld-linux.*")


def check_contents(names: set[str], tag: Tag) -> list[str]:
    """The files a wheel must have, may have and must not have."""
    expected = {f"{PACKAGE}/{name}.py" for name in MODULES}
    expected |= {f"{PACKAGE}/py.typed", f"{PACKAGE}/_ext.pyi"}
    if tag.platform.startswith("macosx"):
        expected.add(f"{PACKAGE}/mlx_adadelta.metallib")
    wrong = [f"{name} is missing" for name in sorted(expected - names)]
    extensions = {name for name in names if EXTENSION.fullmatch(name)}
    if not extensions:
        wrong.append(f"{PACKAGE}/_ext: the native extension is missing")
    information = {name for name in names if ".dist-info/" in name}
    for name in sorted(names - expected - extensions - information):
        what = "a bundled library" if "libmlx" in name else "not part of the package"
        wrong.append(f"{name} is {what}")
    return wrong


def check_elf(binary: lief.ELF.Binary, tag: Tag) -> list[str]:
    wrong = []
    machine = {
        lief.ELF.ARCH.X86_64: "x86_64",
        lief.ELF.ARCH.AARCH64: "aarch64",
    }.get(binary.header.machine_type, str(binary.header.machine_type))
    if not tag.platform.endswith(f"_{machine}") or "linux" not in tag.platform:
        wrong.append(f"the extension is for Linux on {machine}, not {tag.platform}")
    ours = [str(x) for x in binary.libraries if not LINUX.fullmatch(str(x))]
    wrong += check_libraries(ours, "libmlx.so")
    rpaths = [
        entry.runpath
        if isinstance(entry, lief.ELF.DynamicEntryRunPath)
        else entry.rpath
        for entry in binary.dynamic_entries
        if isinstance(entry, (lief.ELF.DynamicEntryRunPath, lief.ELF.DynamicEntryRpath))
    ]
    return wrong + check_rpaths(rpaths, "$ORIGIN/../mlx/lib")


def check_macho(binary: lief.MachO.Binary, tag: Tag) -> list[str]:
    wrong = []
    machine = binary.header.cpu_type
    arm64 = machine == lief.MachO.Header.CPU_TYPE.ARM64
    if not arm64 or not re.fullmatch(r"macosx_\d+_\d+_arm64", tag.platform):
        wrong.append(f"the extension is for macOS on {machine}, not {tag.platform}")
    load = lief.MachO.LoadCommand.TYPE.LOAD_DYLIB
    linked = [x.name for x in binary.libraries if x.command == load]
    ours = [name for name in linked if not name.startswith(SYSTEM)]
    wrong += check_libraries(ours, "@rpath/libmlx.dylib")
    minimum = ".".join(map(str, binary.build_version.minos[:2]))
    tagged = ".".join(tag.platform.split("_")[1:3])
    if not minimum == tagged == MACOS:
        wrong.append(
            f"the extension needs macOS {minimum}, the wheel says {tagged}, "
            f"MLX needs {MACOS}"
        )
    rpaths = [rpath.path for rpath in binary.rpaths]
    return wrong + check_rpaths(rpaths, "@loader_path/../mlx/lib")


def check_libraries(libraries: list[str], expected: str) -> list[str]:
    if libraries == [expected]:
        return []
    return [f"the extension must link {expected} and the system's but has {libraries}"]


def check_rpaths(rpaths: list[str], expected: str) -> list[str]:
    if rpaths == [expected]:
        return []
    return [f"the extension's rpath must be {expected} but is {rpaths}"]


def check_extension(name: str, data: bytes, tag: Tag) -> list[str]:
    """Which Python and machine it is for, and how it links."""
    wrong = []
    version = EXTENSION.fullmatch(f"{PACKAGE}/{name}")
    if version is None or tag.interpreter != f"cp{version[1]}":
        wrong.append(f"{name} is not for {tag.interpreter}")
    binary = lief.parse(data)
    if isinstance(binary, lief.ELF.Binary):
        return wrong + check_elf(binary, tag)
    if isinstance(binary, lief.MachO.Binary):
        return wrong + check_macho(binary, tag)
    return [*wrong, f"{name} is neither an ELF nor a Mach-O file"]


def check_metadata(metadata: Message) -> list[str]:
    wrong = []
    requirements = [Requirement(x) for x in metadata.get_all("Requires-Dist", [])]
    runtime = [x for x in requirements if x.marker is None]
    if [x.name for x in runtime] != ["mlx"]:
        found = ", ".join(map(str, runtime)) or "nothing"
        wrong.append(f"METADATA must require mlx alone but requires {found}")
    elif not {x.operator for x in runtime[0].specifier} >= {">=", "<"}:
        wrong.append(f"METADATA must bound mlx on both sides but has {runtime[0]}")
    if metadata["License-Expression"] != "MIT":
        wrong.append(f"METADATA must say MIT but says {metadata['License-Expression']}")
    return wrong


def check_paths(name: str, data: bytes) -> list[str]:
    found = {
        x
        for x in ABSOLUTE.findall(data)
        if not x.startswith(tuple(map(str.encode, SYSTEM)))
    }
    return [f"{name} holds the path {path.decode()}" for path in sorted(found)]


def check_wheel(path: Path) -> list[str]:
    """What is wrong with a wheel; nothing, if all is well."""
    name, version, _, tags = parse_wheel_filename(path.name)
    tag = sorted(tags, key=str)[0]
    information = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(path) as wheel:
        files = {x: wheel.read(x) for x in wheel.namelist() if not x.endswith("/")}
    wrong = check_contents(set(files), tag)
    for file, data in files.items():
        wrong += check_paths(file, data)
        if EXTENSION.fullmatch(file):
            wrong += check_extension(Path(file).name, data, tag)
    metadata = files.get(f"{information}/METADATA")
    if metadata is None:
        wrong.append(f"{information}/METADATA is missing")
    else:
        wrong += check_metadata(BytesParser().parsebytes(metadata))
    if not files.get(f"{information}/licenses/LICENSE"):
        wrong.append(f"{information}/licenses/LICENSE is missing")
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
