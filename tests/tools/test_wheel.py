"""The wheel that users get, and that scripts/check_wheel refuses broken ones."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import lief
import pytest
from packaging_tools import ROOT, run

sys.path.insert(0, str(ROOT / "scripts"))
from check_wheel import check_wheel

Files = dict[str, bytes]

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="alters an ELF file, made where wheels hold one"
)


def read(wheel: Path) -> Files:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def contents(wheel: Path) -> str:
    """What check-wheel-contents says with pyproject.toml's settings."""
    command = [Path(sys.executable).with_name("check-wheel-contents"), wheel]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def find(files: Files, pattern: str) -> str:
    [name] = [name for name in files if re.search(pattern, name)]
    return name


# ------------------------------- The wheel itself ------------------------------


def test_it_is_as_it_should_be(wheel: Path) -> None:
    assert check_wheel(wheel) == []


def test_it_runs(installation: Path, tmp_path: Path) -> None:
    report = run(installation, "-W", "error", "-m", "mlx_adadelta", cwd=tmp_path)
    assert "cpu    works" in report


def test_the_command(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/check_wheel.py")]
    done = subprocess.run(
        [*command, wheel], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout == f"{wheel}: as it should be\n"
    files = read(wheel)
    del files[find(files, EXTENSION)]
    broken = write(tmp_path / wheel.name, files)
    done = subprocess.run(
        [*command, wheel, broken], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[1:] == [
        f"{broken}: refused",
        "  the native extension is missing",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlx_adadelta.zip", "refused\n  Invalid wheel filename"),
        ("mlx_adadelta-0.1.0-py3-none-any.whl", "refused\n  File is not a zip file"),
    ],
)
def test_what_is_no_wheel_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / name).write_text("")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/check_wheel.py", tmp_path / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert expected in done.stdout


# ------------------------------- Broken wheels --------------------------------

EXTENSION = r"/_ext\..+\.so$"
METADATA = r"/METADATA$"
MLX = b"\nRequires-Dist: mlx<0.33,>=0.31"


def without(pattern: str) -> Callable[[Files], None]:
    def alter(files: Files) -> None:
        del files[find(files, pattern)]

    return alter


def with_file(name: str, data: bytes = b"") -> Callable[[Files], None]:
    def alter(files: Files) -> None:
        assert name not in files
        files[name] = data

    return alter


def replacing(pattern: str, old: bytes, new: bytes) -> Callable[[Files], None]:
    def alter(files: Files) -> None:
        name = find(files, pattern)
        assert old in files[name]
        files[name] = files[name].replace(old, new)

    return alter


def appending(pattern: str, text: bytes) -> Callable[[Files], None]:
    def alter(files: Files) -> None:
        files[find(files, pattern)] += text

    return alter


def with_rpath(rpath: str) -> Callable[[Files], None]:
    def alter(files: Files) -> None:
        name = find(files, EXTENSION)
        binary = lief.ELF.parse(list(files[name]))
        assert binary is not None
        [entry] = [
            x
            for x in binary.dynamic_entries
            if isinstance(x, lief.ELF.DynamicEntryRunPath)
        ]
        entry.runpath = rpath
        files[name] = binary.write_to_bytes()

    return alter


def linking(library: str) -> Callable[[Files], None]:
    def alter(files: Files) -> None:
        name = find(files, EXTENSION)
        binary = lief.ELF.parse(list(files[name]))
        assert binary is not None
        binary.add_library(library)
        files[name] = binary.write_to_bytes()

    return alter


def renamed_extension(files: Files) -> None:
    name = find(files, EXTENSION)
    files[re.sub(r"cpython-\d+", "cpython-39", name)] = files.pop(name)


# What is broken, how, and what is said about it.
BROKEN: dict[str, tuple[Callable[[Files], None], str]] = {
    "no extension": (without(EXTENSION), "native extension is missing"),
    "no extension but a text": (
        lambda files: files.update({find(files, EXTENSION): b"_ext"}),
        "the extension is None, not",
    ),
    "another Python's": (renamed_extension, "is for cp39, the wheel for cp"),
    "libmlx in the package": (
        with_file("mlx_adadelta/libmlx.dylib"),
        "libmlx.dylib is a bundled library",
    ),
    "libmlx beside it": (
        with_file("mlx_adadelta.libs/libmlx-1a2b3c4d.so"),
        "libmlx-1a2b3c4d.so is a bundled library",
    ),
    "no requirement": (
        replacing(METADATA, MLX, b""),
        "require mlx alone but requires nothing",
    ),
    "another requirement": (
        replacing(METADATA, MLX, b"\nRequires-Dist: numpy" + MLX),
        "must require mlx alone but requires numpy, mlx<0.33,>=0.31",
    ),
    "an open requirement": (
        replacing(METADATA, MLX, b"\nRequires-Dist: mlx>=0.31"),
        "bound mlx on both sides but has mlx>=0.31",
    ),
    "a path in a text": (
        appending(r"/_ext\.pyi$", b"# from /home/someone/adadelta/csrc/bindings.cpp\n"),
        "_ext.pyi holds the path /home/someone/adadelta/csrc/bindings.cpp",
    ),
    "a path in the extension": (
        appending(EXTENSION, b"\0/tmp/pip-build-env/mlx/array.h\0"),
        "holds the path /tmp/pip-build-env/mlx/array.h",
    ),
}
BROKEN_ELF: dict[str, tuple[Callable[[Files], None], str]] = {
    "an absolute rpath": (with_rpath("/mlx"), "rpath must be $ORIGIN/../mlx/lib but"),
    "a second rpath": (
        with_rpath("$ORIGIN/../mlx/lib:$ORIGIN"),
        "rpath must be $ORIGIN/../mlx/lib but is",
    ),
    "another library": (linking("libblas.so.3"), "must link libmlx.so and"),
    "no libmlx": (
        replacing(EXTENSION, b"\0libmlx.so\0", b"\0libm.so.6\0"),
        "must link libmlx.so and the system's but has []",
    ),
}


@pytest.mark.parametrize(
    ("alter", "expected"),
    [
        *(pytest.param(*x, id=name) for name, x in BROKEN.items()),
        *(pytest.param(*x, id=k, marks=linux_only) for k, x in BROKEN_ELF.items()),
    ],
)
def test_a_broken_one_is_refused(
    wheel: Path, tmp_path: Path, alter: Callable[[Files], None], expected: str
) -> None:
    files = read(wheel)
    alter(files)
    wrong = check_wheel(write(tmp_path / wheel.name, files))
    assert len(wrong) == 1, wrong
    assert expected in wrong[0]


@pytest.mark.parametrize(
    ("alter", "expected"),
    [
        (without(r"/optimizer\.py$"), "W101"),
        (without(r"/py\.typed$"), "W101"),
        (with_file("tests/test_x.py"), "W202"),
    ],
    ids=["no module", "no py.typed", "a stray file"],
)
def test_contents_are_held_against_the_tree(
    wheel: Path, tmp_path: Path, alter: Callable[[Files], None], expected: str
) -> None:
    files = read(wheel)
    assert contents(wheel) == ""
    alter(files)
    record = find(files, r"/RECORD$")  # which is what it reads
    digest = "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0"
    lines = [f"{name},{digest}\n" for name in files if name != record]
    files[record] = "".join([*lines, f"{record},,\n"]).encode()
    assert expected in contents(write(tmp_path / wheel.name, files))


# ------------------------------ A wheel for macOS ------------------------------


def make_macho(
    folder: Path,
    library: str = "@rpath/libmlx.dylib",
    rpath: str = "@loader_path/../mlx/lib",
    target: str = "aarch64-macos.14.0",
) -> bytes:
    """Links a library as the extension is linked; there is nothing in it."""
    (folder / "mlx.c").write_text("int mlx(void) { return 0; }")
    (folder / "ext.c").write_text(
        "int mlx(void); int PyInit__ext(void) { return mlx(); }"
    )
    zig = [sys.executable, "-m", "ziglang", "build-lib", "-dynamic", "-fstrip"]
    zig += ["-target", target, "-fno-compiler-rt", "-fno-ubsan-rt"]
    cache = {f"ZIG_{x}_CACHE_DIR": str(folder / "zig") for x in ("LOCAL", "GLOBAL")}
    files = ["mlx.c", "-femit-bin=libmlx.dylib", "-install_name", library]
    run(*zig, *files, cwd=folder, **cache)
    files = ["ext.c", "libmlx.dylib", "-femit-bin=ext.so", "-rpath", rpath]
    run(*zig, *files, cwd=folder, **cache)
    return (folder / "ext.so").read_bytes()


def make_macos_wheel(
    wheel: Path, folder: Path, extension: bytes, platform: str = "macosx_14_0_arm64"
) -> Path:
    """The wheel with another extension, and something for a Metal library."""
    files = read(wheel)
    native = find(files, EXTENSION)
    del files[native]
    files[re.sub(r"-[^-]*-linux-gnu", "-darwin", native)] = extension
    files["mlx_adadelta/mlx_adadelta.metallib"] = b"MTLB"
    name = re.sub(r"[^-]+\.whl", f"{platform}.whl", wheel.name)
    return write(folder / name, files)


@linux_only
def test_one_for_macos(wheel: Path, tmp_path: Path) -> None:
    path = make_macos_wheel(wheel, tmp_path, make_macho(tmp_path))
    assert check_wheel(path) == []
    files = read(path)
    del files["mlx_adadelta/mlx_adadelta.metallib"]
    wrong = check_wheel(write(path, files))
    assert wrong == ["mlx_adadelta/mlx_adadelta.metallib is missing"]


@linux_only
@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ({"library": "/opt/libmlx.dylib"}, "must link @rpath/libmlx.dylib and"),
        ({"rpath": "@loader_path"}, "rpath must be @loader_path/../mlx/lib but is"),
        ({"target": "aarch64-macos.15.0"}, "needs macOS 15.0, the wheel says 14.0"),
    ],
    ids=["another libmlx", "another rpath", "a newer macOS"],
)
def test_a_broken_one_for_macos_is_refused(
    wheel: Path, tmp_path: Path, link: dict[str, str], expected: str
) -> None:
    path = make_macos_wheel(wheel, tmp_path, make_macho(tmp_path, **link))
    [wrong] = check_wheel(path)
    assert expected in wrong


@linux_only
def test_one_for_an_older_macos_than_mlx_is_refused(
    wheel: Path, tmp_path: Path
) -> None:
    extension = make_macho(tmp_path, target="aarch64-macos.13.0")
    path = make_macos_wheel(wheel, tmp_path, extension, "macosx_13_0_arm64")
    [wrong] = check_wheel(path)
    assert "needs macOS 13.0, the wheel says 13.0, MLX needs 14.0" in wrong


@linux_only
def test_a_linux_extension_for_macos_is_refused(wheel: Path, tmp_path: Path) -> None:
    files = read(wheel)
    path = make_macos_wheel(wheel, tmp_path, files[find(files, EXTENSION)])
    wrong = check_wheel(path)
    assert any("not macosx_14_0_arm64" in line for line in wrong)
