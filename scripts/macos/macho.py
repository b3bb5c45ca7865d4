"""Reads how a 64-bit Mach-O file links: as much as `otool -lL` and `nm -mu` tell."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

MAGIC_64 = 0xFEEDFACF
# Load commands, from <mach-o/loader.h>.
SYMTAB = 0x2
LOAD_DYLIB = {0xC, 0x80000018, 0x8000001F}  # plain, weak, re-exported
RPATH = 0x8000001C
BUILD_VERSION = 0x32
# A symbol's type, from <mach-o/nlist.h>.
STAB, TYPE, EXTERNAL = 0xE0, 0x0E, 0x01
UNDEFINED, DEFINED = 0x00, 0x0E


@dataclass
class MachO:
    libraries: list[str] = field(default_factory=list)
    rpaths: list[str] = field(default_factory=list)
    minimum: str = ""
    """The first version of the system that loads it."""
    undefined: dict[str, str | None] = field(default_factory=dict)
    """Symbol to the library it was found in, None if left to the dynamic linker."""
    exported: set[str] = field(default_factory=set)


def read_macho(path: Path) -> MachO:
    data = path.read_bytes()
    if len(data) < 32 or struct.unpack_from("<I", data)[0] != MAGIC_64:
        raise ValueError(f"{path}: not a 64-bit Mach-O file")

    def text(offset: int) -> str:
        return data[offset : data.index(b"\0", offset)].decode()

    file = MachO()
    symbols = (0, 0, 0)
    offset = 32
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        command, size, value = struct.unpack_from("<3I", data, offset)
        if command in LOAD_DYLIB:
            file.libraries.append(text(offset + value))
        elif command == RPATH:
            file.rpaths.append(text(offset + value))
        elif command == BUILD_VERSION:
            version = struct.unpack_from("<I", data, offset + 12)[0]
            file.minimum = f"{version >> 16}.{version >> 8 & 0xFF}"
        elif command == SYMTAB:
            symbols = struct.unpack_from("<3I", data, offset + 8)
        offset += size

    table, count, names = symbols
    for i in range(count):
        name, kind, _, flags, _ = struct.unpack_from("<IBBHQ", data, table + 16 * i)
        visible = kind & (STAB | TYPE | EXTERNAL)
        if visible == EXTERNAL | UNDEFINED:
            ordinal = flags >> 8
            found = 0 < ordinal <= len(file.libraries)
            file.undefined[text(names + name)] = (
                file.libraries[ordinal - 1] if found else None
            )
        elif visible == EXTERNAL | DEFINED:
            file.exported.add(text(names + name))
    return file
