"""Lists the faults of an extension that was linked for macOS on arm64.

check.py SITE EXTENSION: SITE holds MLX as pip lays it on a Mac.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import lief
import nanobind

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from check_wheel import check_extension, check_paths

LIBMLX = "@rpath/libmlx.dylib"
# std:: with its v-tables, operators new and delete, the run time of the C++ ABI.
LIBCXX = re.compile(
    r"__Z(T[ISVT])?(NK?)?St|__ZT[IV]N10__cxxabiv1|__Z[nd][wal]|___cxa_|___gxx_"
)


def definers(extension: lief.MachO.Binary) -> dict[str, str]:
    """For each undefined symbol: the library that defines it, or "nowhere"."""
    itself = lief.MachO.LoadCommand.TYPE.ID_DYLIB
    libraries = [x.name for x in extension.libraries if x.command != itself]
    # What nanobind lets an extension leave to the interpreter.
    listed = Path(nanobind.cmake_dir(), "darwin-ld-cpython.sym").read_text()
    python, found = set(re.findall(r"-U (\S+)", listed)), {}
    for symbol in extension.symbols:
        name = str(symbol.name)
        if symbol.category != lief.MachO.Symbol.CATEGORY.UNDEFINED:
            continue
        if 0 < symbol.library_ordinal <= len(libraries):
            found[name] = libraries[symbol.library_ordinal - 1]
        elif name in python:
            found[name] = "Python"
        elif LIBCXX.match(name) and "mlx" not in name:
            found[name] = "libc++"
        else:
            found[name] = "nowhere"
    return found


def nanobind_abi(library: Path) -> set[bytes]:
    """Such as v17_system_libcpp_abi1; within a longer name since nanobind 3."""
    return set(
        re.findall(rb"\bnanobind_\w+_v\d+\w*|\bv\d+_system_\w+", library.read_bytes())
    )


def check(site: Path, path: Path) -> list[str]:
    """Prints where the symbols come from, and lists the faults."""
    extension = lief.parse(path)
    if not isinstance(extension, lief.MachO.Binary):
        return [f"{path} must be a Mach-O file"]
    found = definers(extension)
    counts = Counter(found.values())
    for library, count in counts.most_common():
        print(f"{count:5} undefined symbols come from {library}")
    missing = [name for name, where in found.items() if where == "nowhere"]
    wrong = [f"undefined symbol: {name}" for name in sorted(missing)]
    if not counts[LIBMLX]:
        wrong.append("nothing is taken from libmlx.dylib")
    if "_PyInit__ext" not in {str(x.name) for x in extension.exported_symbols}:
        wrong.append("_PyInit__ext is not exported")
    [module] = site.glob("mlx/core.*.so")
    if not nanobind_abi(path) or nanobind_abi(path) != nanobind_abi(module):
        wrong.append("not mlx.core's nanobind ABI: the two cannot share types")
    data = path.read_bytes()
    return wrong + check_extension(data) + check_paths(path.name, data)


if __name__ == "__main__":
    wrong = check(*map(Path, sys.argv[1:]))
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(bool(wrong))
