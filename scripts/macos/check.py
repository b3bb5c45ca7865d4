"""Compiles and links the extension for macOS on arm64, on any Linux.

CMakeLists.txt builds it as it would on a Mac, against the headers and libmlx.dylib
of MLX's own macOS wheels; then every symbol it leaves undefined is accounted for,
and scripts/check_wheel.py goes through a wheel made around it: not one to install,
for the Metal library is missing, which only Apple's compiler makes.
What stands in for Apple's toolchain: ziglang (clang and libSystem), this folder's
stubs, and this machine's Python headers, which suit themselves to macOS.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path

import lief

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from check_wheel import check_wheel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "macos"
WHEELS = ROOT / "build" / "macos-wheels"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
CPYTHON = "cp" + PYTHON.replace(".", "")

TOOLS = ("cmake", "nanobind", "ninja", "ziglang")

LIBCXX = "/usr/lib/libc++.1.dylib"
# std:: and its v-tables, operators new and delete, the C++ ABI's run time.
LIBCXX_SYMBOL = re.compile(
    r"__Z(T[ISVT])?(NK?)?St|__ZT[IV]N10__cxxabiv1|__Z[nd][wal]|___cxa_|___gxx_"
)


class CheckError(Exception):
    """What is wrong, for the person who runs this."""


def run(command: list[str], **environment: str) -> None:
    """Runs a command; when it fails, all of its output is the error."""
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise CheckError(f"{shlex.join(command)}\n{done.stdout}")


def pinned_mlx() -> str:
    """The version in pyproject.toml's build requirements."""
    pin = re.search(r'"mlx==([^";\s]+)', (ROOT / "pyproject.toml").read_text())
    if pin is None:
        raise CheckError("pyproject.toml: no build requirement mlx==…")
    return pin[1]


def fetch_wheel(name: str, version: str) -> Path:
    """A wheel for macOS 14 on arm64; downloaded once."""
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if name == "mlx":
        pattern = pattern.replace("*", f"{CPYTHON}-*")
    if not any(WHEELS.glob(pattern)):
        print(f"downloading {name} {version} for macOS", flush=True)
        run(
            [
                *[sys.executable, "-m", "pip", "download", f"{name}=={version}"],
                *["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(WHEELS)],
                *["--python-version", PYTHON, "--platform", "macosx_14_0_arm64"],
            ]
        )
    return next(WHEELS.glob(pattern))


def unpack_mlx(version: str) -> Path:
    """A site-packages folder with MLX as pip lays it on a Mac."""
    site = BUILD / f"mlx-{version}-{CPYTHON}"
    if not site.exists():
        partial = BUILD / f"{site.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for name in ("mlx", "mlx-metal"):
            with zipfile.ZipFile(fetch_wheel(name, version)) as wheel:
                wheel.extractall(partial)
        # `python -m mlx --cmake-dir` imports it, and mlx.core runs only on a Mac.
        (partial / "mlx/core/__init__.py").write_text(f"__version__ = '{version}'\n")
        partial.rename(site)
    return site


def python_headers() -> Path:
    """This Python's headers, without Debian's pyconfig.h that knows only Linux."""
    include = Path(sysconfig.get_config_var("INCLUDEPY"))
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    config = include.parent / multiarch / include.name / "pyconfig.h"
    headers = BUILD / f"include-{CPYTHON}"
    shutil.rmtree(headers, ignore_errors=True)
    shutil.copytree(include, headers)
    if multiarch and config.exists():
        shutil.copy2(config, headers)
    return headers


def made_with() -> str:
    """The Python and the packages that a build depends on."""
    try:
        versions = [f"{name} {installed_version(name)}" for name in TOOLS]
    except PackageNotFoundError as error:
        raise CheckError(
            f"{sys.executable} has no package {error.name}: run scripts/check_macos"
        ) from None
    return "\n".join([sys.version, sys.executable, sys.base_prefix, *versions, ""])


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def build_extension(site: Path) -> Path:
    """Configures and builds CMakeLists.txt's `_ext`."""
    build = BUILD / f"build-{site.name}"
    stamp = build / "made-with.txt"
    if not stamp.exists() or stamp.read_text() != made_with():
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        stamp.write_text(made_with())
    environment = {
        "PYTHONPATH": str(site),
        "ZIG": str(package_folder("ziglang") / "zig"),
        "ZIG_GLOBAL_CACHE_DIR": str(BUILD / "zig-cache"),
        "ZIG_LOCAL_CACHE_DIR": str(BUILD / "zig-cache"),
    }
    cmake = [sys.executable, "-m", "cmake"]
    run(
        [
            *[*cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)],
            f"-DCMAKE_TOOLCHAIN_FILE={HERE / 'toolchain.cmake'}",
            f"-DCMAKE_MAKE_PROGRAM={Path(sysconfig.get_path('scripts')) / 'ninja'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython_INCLUDE_DIR={python_headers()}",
            f"-DSKBUILD_SOABI=cpython-{CPYTHON[2:]}-darwin",
        ],
        **environment,
    )
    target = "mlx_adadelta_module"
    run([*cmake, "--build", str(build), "--target", target], **environment)
    return build / f"_ext.cpython-{CPYTHON[2:]}-darwin.so"


def python_symbols() -> set[str]:
    """What nanobind lets an extension leave to the interpreter."""
    listed = package_folder("nanobind") / "cmake/darwin-ld-cpython.sym"
    return set(re.findall(r"-U (\S+)", listed.read_text()))


class MachO:
    """How a Mach-O file links."""

    def __init__(self, path: Path) -> None:
        binary = lief.parse(path)
        if not isinstance(binary, lief.MachO.Binary):
            raise CheckError(f"{path}: not a Mach-O file")
        itself = lief.MachO.LoadCommand.TYPE.ID_DYLIB
        self.libraries = [x.name for x in binary.libraries if x.command != itself]
        self.rpaths = [x.path for x in binary.rpaths]
        # The first version of the system that loads it.
        self.minimum = ".".join(map(str, binary.build_version.minos[:2]))
        self.exported = {str(x.name) for x in binary.exported_symbols}
        # Symbol to the library it was found in, None if left to the dynamic linker.
        self.undefined: dict[str, str | None] = {}
        for symbol in binary.symbols:
            if symbol.category == lief.MachO.Symbol.CATEGORY.UNDEFINED:
                i = symbol.library_ordinal
                found = 0 < i <= len(self.libraries)
                self.undefined[str(symbol.name)] = (
                    self.libraries[i - 1] if found else None
                )


@dataclass
class Symbols:
    """What the extension leaves undefined, by who defines it."""

    libraries: dict[str, set[str]]
    libcxx: set[str]
    python: set[str]
    missing: set[str]


def sort_symbols(extension: MachO) -> Symbols:
    libraries: dict[str, set[str]] = {name: set() for name in extension.libraries}
    found = Symbols(libraries, set(), set(), set())
    allowed = python_symbols()
    for symbol, library in extension.undefined.items():
        if library is not None:
            libraries[library].add(symbol)
        elif symbol in allowed:
            found.python.add(symbol)
        elif LIBCXX_SYMBOL.match(symbol) and "mlx" not in symbol:
            found.libcxx.add(symbol)
        else:
            found.missing.add(symbol)
    return found


def nanobind_abi(library: Path) -> set[bytes]:
    return set(re.findall(rb"nanobind_\w+_v\d+\w*", library.read_bytes()))


def check(site: Path, path: Path) -> list[str]:
    """Prints how the extension links; what is wrong with it."""
    extension = MachO(path)
    symbols = sort_symbols(extension)
    mlx_library = site / "mlx/lib/libmlx.dylib"
    (mlx_module,) = site.glob("mlx/core.*.so")
    theirs = {
        symbol
        for binary in (mlx_library, mlx_module)
        for symbol, library in MachO(binary).undefined.items()
        if library == LIBCXX
    }

    rows = [
        (Path(library).name, len(names), "resolved")
        for library, names in symbols.libraries.items()
    ]
    known = len(symbols.libcxx & theirs)
    rows += [
        ("libc++", len(symbols.libcxx), f"the system's; MLX itself takes {known}"),
        ("Python", len(symbols.python), "the interpreter's, as nanobind lists them"),
        ("nowhere", len(symbols.missing), ""),
    ]
    print(f"\n{path.name}, undefined symbols found in")
    for name, count, note in rows:
        print(f"  {name:20}{count:5}  {note}".rstrip())

    wrong = [f"undefined symbol: {name}" for name in sorted(symbols.missing)]
    if not symbols.libraries.get("@rpath/libmlx.dylib"):
        wrong.append("nothing is taken from libmlx.dylib")
    if "_PyInit__ext" not in extension.exported:
        wrong.append("_PyInit__ext is not exported")
    print(f"rpath           {', '.join(extension.rpaths)}")
    # Where pip puts it, beside MLX.
    origin = str(site / "mlx_adadelta")
    folders = {
        os.path.normpath(rpath.replace("@loader_path", origin))
        for rpath in extension.rpaths
    }
    if folders != {str(mlx_library.parent)}:
        wrong.append("rpath does not lead to libmlx.dylib")
    print(f"macOS at least  {extension.minimum}")
    if extension.minimum != MachO(mlx_library).minimum:
        wrong.append(f"libmlx.dylib needs macOS {MachO(mlx_library).minimum}")
    abi = nanobind_abi(path)
    print(f"nanobind        {b', '.join(abi).decode()}")
    if not abi or abi != nanobind_abi(mlx_module):
        wrong.append("not mlx.core's nanobind ABI: its types would be strangers")
    return wrong


def make_wheel(extension: Path) -> Path:
    """Puts it where the installed package has its own."""
    package = distribution("mlx-adadelta")
    folder = BUILD / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        ROOT / "python/mlx_adadelta",
        folder / "mlx_adadelta",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy2(extension, folder / "mlx_adadelta")
    stub = package.locate_file("mlx_adadelta/_ext.pyi")
    shutil.copy2(str(stub), folder / "mlx_adadelta")
    information = folder / f"mlx_adadelta-{package.version}.dist-info"
    (information / "licenses").mkdir(parents=True)
    for name in ("METADATA", "licenses/LICENSE"):
        (information / name).write_text(package.read_text(name) or "")
    tag = f"{CPYTHON}-{CPYTHON}-macosx_14_0_arm64"
    (information / "WHEEL").write_text(
        f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n"
    )
    run([sys.executable, "-m", "wheel", "pack", str(folder), "-d", str(BUILD)])
    return BUILD / f"mlx_adadelta-{package.version}-{tag}.whl"


def check_the_wheel(wheel: Path) -> list[str]:
    print(f"\n{wheel.name}, all but the Metal library")
    missing = "mlx_adadelta/mlx_adadelta.metallib is missing"
    wrong = check_wheel(wheel)
    if missing not in wrong:
        return [*wrong, f"nothing says that {missing}"]
    return [line for line in wrong if line != missing]


def main() -> int:
    argparse.ArgumentParser(
        prog="check_macos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        version = pinned_mlx()
        site = unpack_mlx(version)
        print(f"building for macOS 14 on arm64, mlx {version}, Python {PYTHON}")
        extension = build_extension(site)
        wrong = check(site, extension) + check_the_wheel(make_wheel(extension))
    except CheckError as error:
        wrong = [str(error)]
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
