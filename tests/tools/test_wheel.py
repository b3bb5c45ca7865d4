"""The wheel that users get, and that scripts/check_wheel refuses broken ones."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lief
import pytest
from packaging_tools import ROOT, install, run

from mlx_adadelta.options import MLX_VERSION

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


def command(*wheels: Path) -> tuple[int, list[str]]:
    """Exit status and lines of scripts/check_wheel.py."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/check_wheel.py", *wheels],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_the_command(wheel: Path, tmp_path: Path) -> None:
    assert command(wheel) == (0, [f"{wheel}: as it should be"])
    files = read(wheel)
    del files[find(files, EXTENSION)]
    broken = write(tmp_path / wheel.name, files)
    lines = [f"{broken}: refused", "  the native extension is missing"]
    assert command(wheel, broken) == (1, [f"{wheel}: as it should be", *lines])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlx_adadelta.zip", "  Invalid wheel filename"),
        ("mlx_adadelta-0.1.0-py3-none-any.whl", "  File is not a zip file"),
    ],
)
def test_what_is_no_wheel_is_refused(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / name).write_text("")
    status, (first, second) = command(tmp_path / name)
    assert (status, first) == (1, f"{tmp_path / name}: refused")
    assert second.startswith(expected)


# ------------------------------- Broken wheels --------------------------------

EXTENSION = r"/_ext\..+\.so$"
METADATA = r"/METADATA$"
MLX = b"\nRequires-Dist: mlx>=0.30.6"


Alter = Callable[[Files], object]


def without(pattern: str) -> Alter:
    return lambda files: files.pop(find(files, pattern))


def with_file(name: str, data: bytes = b"") -> Alter:
    return lambda files: files.update({name: data})


def editing(pattern: str, edit: Callable[[bytes], bytes]) -> Alter:
    def alter(files: Files) -> None:
        name = find(files, pattern)
        before, files[name] = files[name], edit(files[name])
        assert files[name] != before

    return alter


def replacing(pattern: str, old: bytes, new: bytes) -> Alter:
    return editing(pattern, lambda data: data.replace(old, new))


def appending(pattern: str, text: bytes) -> Alter:
    return editing(pattern, lambda data: data + text)


def relinked(change: Callable[[lief.ELF.Binary], object]) -> Alter:
    def edit(data: bytes) -> bytes:
        binary = lief.ELF.parse(list(data))
        assert binary is not None
        change(binary)
        return binary.write_to_bytes()

    return editing(EXTENSION, edit)


def with_rpath(rpath: str) -> Alter:
    def change(binary: lief.ELF.Binary) -> None:
        kind = lief.ELF.DynamicEntryRunPath
        [entry] = [x for x in binary.dynamic_entries if isinstance(x, kind)]
        entry.runpath = rpath

    return relinked(change)


def linking(library: str) -> Alter:
    return relinked(lambda binary: binary.add_library(library))


def renamed_extension(files: Files) -> None:
    name = find(files, EXTENSION)
    files[re.sub(r"cpython-\d+", "cpython-39", name)] = files.pop(name)


# By fault: how to make it, and a part of the message.
BROKEN: dict[str, tuple[Alter, str]] = {
    "no extension": (without(EXTENSION), "native extension is missing"),
    "no extension but a text": (
        editing(EXTENSION, lambda _: b"_ext"),
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
        "must require mlx alone but requires numpy, mlx>=0.30.6",
    ),
    "an open requirement": (
        replacing(METADATA, MLX, b"\nRequires-Dist: mlx"),
        "require mlx from a release on but has mlx",
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
BROKEN_ELF: dict[str, tuple[Alter, str]] = {
    "an absolute rpath": (
        with_rpath("/mlx"),
        "rpath must be $ORIGIN/../../mlx/lib but",
    ),
    "a second rpath": (
        with_rpath("$ORIGIN/../../mlx/lib:$ORIGIN"),
        "rpath must be $ORIGIN/../../mlx/lib but is",
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
    wheel: Path, tmp_path: Path, alter: Alter, expected: str
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
    wheel: Path, tmp_path: Path, alter: Alter, expected: str
) -> None:
    files = read(wheel)
    assert contents(wheel) == ""
    alter(files)
    record = find(files, r"/RECORD$")  # check-wheel-contents reads this list
    digest = "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0"
    lines = [f"{name},{digest}\n" for name in files if name != record]
    files[record] = "".join([*lines, f"{record},,\n"]).encode()
    assert expected in contents(write(tmp_path / wheel.name, files))


# ----------------------- One wheel for two releases of MLX ---------------------

MERGE = [sys.executable, ROOT / "scripts/merge_wheels.py"]
CHOOSE = """
import sys, mlx.core as mx
mx.__version__ = sys.argv[1]
from mlx_adadelta.backend import extension, why_not
print(extension, why_not)
"""


def made_for(release: str, wheel: Path, folder: Path) -> Path:
    """The same wheel with its extension in the folder of another release."""
    here, there = f"/mlx-{MLX_VERSION}/", f"/mlx-{release}/"
    files = {name.replace(here, there): data for name, data in read(wheel).items()}
    replacing(r"/RECORD$", here.encode(), there.encode())(files)
    return write(folder / wheel.name, files)


def test_two_are_merged(wheel: Path, tmp_path: Path) -> None:
    other = made_for("0.0.1", wheel, tmp_path)
    run(*MERGE, tmp_path / "merged", other, wheel)
    [merged] = (tmp_path / "merged").iterdir()
    assert read(merged).keys() == read(wheel).keys() | read(other).keys()
    assert check_wheel(merged) == []
    # Here the two extensions are equal.
    assert re.findall(r"W\d+: .*", contents(merged)) == [
        "W002: Wheel contains duplicate files:"
    ]
    run(*MERGE, tmp_path / "again", merged)  # unpacking compares RECORD

    python = install(merged, tmp_path / "environment")
    for release, expected in {
        MLX_VERSION: f"/mlx-{MLX_VERSION}/_ext.",
        "0.0.1": f"was built for mlx {MLX_VERSION}, but this is mlx 0.0.1",
        "99": f"was built for mlx 0.0.1, {MLX_VERSION}, but this is mlx 99",
    }.items():
        command = ["-W", "ignore", "-c", CHOOSE, release]
        assert expected in run(python, *command, cwd=tmp_path)


def test_two_that_do_not_belong_together(wheel: Path, tmp_path: Path) -> None:
    other = write(tmp_path / wheel.name.replace("-cp", "-1-cp"), read(wheel))
    files = read(wheel)
    appending(r"/update\.py$", b"# another commit\n")(files)
    edited = write(tmp_path / wheel.name, files)
    for path, expected in (
        (other, f"error: {other} must be named {wheel.name}\n"),
        (edited, "error: mlx_adadelta/update.py must be the same in each wheel\n"),
    ):
        command = [*MERGE, tmp_path, wheel, path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, expected)


# ------------------------------ A wheel for macOS ------------------------------


def make_macho(
    folder: Path,
    library: str = "@rpath/libmlx.dylib",
    rpath: str = "@loader_path/../../mlx/lib",
    target: int = 14,
) -> bytes:
    """Links an empty library in the way that the extension is linked."""
    (folder / "mlx.c").write_text("int mlx(void) { return 0; }")
    (folder / "ext.c").write_text(
        "int mlx(void); int PyInit__ext(void) { return mlx(); }"
    )
    zig = [sys.executable, "-m", "ziglang", "build-lib", "-dynamic", "-fstrip"]
    zig += ["-target", f"aarch64-macos.{target}.0", "-fno-compiler-rt", "-fno-ubsan-rt"]
    cache = {f"ZIG_{x}_CACHE_DIR": str(folder / "zig") for x in ("LOCAL", "GLOBAL")}
    files = ["mlx.c", "-femit-bin=libmlx.dylib", "-install_name", library]
    run(*zig, *files, cwd=folder, **cache)
    files = ["ext.c", "libmlx.dylib", "-femit-bin=ext.so", "-rpath", rpath]
    run(*zig, *files, cwd=folder, **cache)
    return (folder / "ext.so").read_bytes()


def make_macos_wheel(
    wheel: Path, folder: Path, extension: bytes, platform: int = 14
) -> Path:
    """The wheel with another extension and a stand-in for the Metal library."""
    files = read(wheel)
    native = find(files, EXTENSION)
    del files[native]
    files[re.sub(r"-[^-]*-linux-gnu", "-darwin", native)] = extension
    files["mlx_adadelta/mlx_adadelta.metallib"] = b"MTLB"
    name = re.sub(r"[^-]+\.whl", f"macosx_{platform}_0_arm64.whl", wheel.name)
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
    ("link", "platform", "expected"),
    [
        ({"library": "/opt/libmlx.dylib"}, 14, "must link @rpath/libmlx.dylib and"),
        ({"rpath": "@loader_path"}, 14, "rpath must be @loader_path/../../mlx/lib but"),
        ({"target": 15}, 14, "needs macOS 15.0, the wheel says 14.0"),
        ({"target": 13}, 13, "needs macOS 13.0, the wheel says 13.0, MLX needs 14.0"),
    ],
    ids=["another libmlx", "another rpath", "a newer macOS", "an older one than MLX"],
)
def test_a_broken_one_for_macos_is_refused(
    wheel: Path, tmp_path: Path, link: dict[str, Any], platform: int, expected: str
) -> None:
    extension = make_macho(tmp_path, **link)
    path = make_macos_wheel(wheel, tmp_path, extension, platform)
    [wrong] = check_wheel(path)
    assert expected in wrong


@linux_only
def test_a_linux_extension_for_macos_is_refused(wheel: Path, tmp_path: Path) -> None:
    files = read(wheel)
    path = make_macos_wheel(wheel, tmp_path, files[find(files, EXTENSION)])
    wrong = check_wheel(path)
    assert any("not macosx_14_0_arm64" in line for line in wrong)
