"""The wheel that users get, and that scripts/check_wheel refuses broken ones."""

import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import lief
import pytest
from packaging_tools import ROOT, attempt, install, run

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
    status, output = attempt("check-wheel-contents", wheel, cwd=ROOT)
    return output if status else ""


def find(files: Files, pattern: str) -> str:
    [name] = [name for name in files if re.search(pattern, name)]
    return name


# ------------------------------- The wheel itself ------------------------------


def test_it_is_as_it_should_be(wheel: Path) -> None:
    assert check_wheel(wheel) == []
    files = read(wheel)
    metadata = files[find(files, r"/METADATA$")].decode()
    assert re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.M) == ["mlx>=0.30.6"]


def test_it_runs(installation: Path, tmp_path: Path) -> None:
    report = run(installation, "-W", "error", "-m", "mlx_adadelta", cwd=tmp_path)
    assert "cpu    works" in report


def test_the_command(wheel: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts/check_wheel.py", wheel]
    good = f"{wheel}: as it should be\n"
    assert attempt(*command) == (0, good)
    files = read(wheel)
    del files[find(files, EXTENSION)]
    broken = write(tmp_path / wheel.name, files)
    bad = f"{broken}: refused\n  the native extension is missing\n"
    assert attempt(*command, broken) == (1, good + bad)


# ------------------------------- Broken wheels --------------------------------

EXTENSION = r"/_ext\..+\.so$"

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


# By fault: how to make it, and a part of the message.
BROKEN: dict[str, tuple[Alter, str]] = {
    "no extension": (without(EXTENSION), "native extension is missing"),
    "no extension but a text": (
        editing(EXTENSION, lambda _: b"_ext"),
        "the extension must be a shared library",
    ),
    "libmlx": (
        with_file("mlx_adadelta.libs/libmlx-1a2b3c4d.so"),
        "libmlx-1a2b3c4d.so is a bundled library",
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

WHEEL = [sys.executable, "-m", "wheel"]
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
    """As scripts/build_wheel does it."""
    other = made_for("0.0.1", wheel, tmp_path)
    for one in (other, wheel):
        run(*WHEEL, "unpack", "--dest", tmp_path / "union", one)
    (tmp_path / "merged").mkdir()
    [union] = (tmp_path / "union").iterdir()
    run(*WHEEL, "pack", "--dest-dir", tmp_path / "merged", union)
    [merged] = (tmp_path / "merged").iterdir()
    assert read(merged).keys() == read(wheel).keys() | read(other).keys()
    assert check_wheel(merged) == []
    # Here the two extensions are equal.
    assert re.findall(r"W\d+: .*", contents(merged)) == [
        "W002: Wheel contains duplicate files:"
    ]
    run(*WHEEL, "unpack", "--dest", tmp_path / "again", merged)  # compares RECORD

    python = install(merged, tmp_path / "environment")
    for release, expected in {
        MLX_VERSION: f"/mlx-{MLX_VERSION}/_ext.",
        "0.0.1": "/mlx-0.0.1/_ext.",
        "99": f"was built for mlx 0.0.1, {MLX_VERSION}, but this is mlx 99",
    }.items():
        command = ["-W", "ignore", "-c", CHOOSE, release]
        assert expected in run(python, *command, cwd=tmp_path)


# ------------------------------ A wheel for macOS ------------------------------


def make_macho(
    folder: Path,
    library: str = "@rpath/libmlx.dylib",
    rpath: str = "@loader_path/../../mlx/lib",
) -> bytes:
    """Links an empty library in the way that the extension is linked."""
    (folder / "mlx.c").write_text("int mlx(void) { return 0; }")
    (folder / "ext.c").write_text(
        "int mlx(void); int PyInit__ext(void) { return mlx(); }"
    )
    zig = [sys.executable, "-m", "ziglang", "build-lib", "-dynamic", "-fstrip"]
    zig += ["-target", "aarch64-macos.14.0", "-fno-compiler-rt", "-fno-ubsan-rt"]
    cache = {f"ZIG_{x}_CACHE_DIR": str(folder / "zig") for x in ("LOCAL", "GLOBAL")}
    files = ["mlx.c", "-femit-bin=libmlx.dylib", "-install_name", library]
    run(*zig, *files, cwd=folder, **cache)
    files = ["ext.c", "libmlx.dylib", "-femit-bin=ext.so", "-rpath", rpath]
    run(*zig, *files, cwd=folder, **cache)
    return (folder / "ext.so").read_bytes()


@linux_only
@pytest.mark.parametrize(
    ("link", "metallib", "expected"),
    [
        ({}, True, []),
        ({}, False, ["mlx_adadelta/mlx_adadelta.metallib is missing"]),
        ({"library": "/x.dylib"}, True, ["must link @rpath/libmlx.dylib and"]),
        ({"rpath": "@x"}, True, ["rpath must be @loader_path/../../mlx/lib but"]),
    ],
    ids=["good", "no metallib", "another libmlx", "another rpath"],
)
def test_one_for_macos(
    wheel: Path,
    tmp_path: Path,
    link: dict[str, str],
    metallib: bool,
    expected: list[str],
) -> None:
    files = read(wheel)
    native = find(files, EXTENSION)
    del files[native]
    renamed = re.sub(r"-[^-]*-linux-gnu", "-darwin", native)
    files[renamed] = make_macho(tmp_path, **link)
    if metallib:
        files["mlx_adadelta/mlx_adadelta.metallib"] = b"MTLB"
    name = re.sub(r"[^-]+\.whl", "macosx_14_0_arm64.whl", wheel.name)
    wrong = check_wheel(write(tmp_path / name, files))
    assert len(wrong) == len(expected), wrong
    assert all(part in line for part, line in zip(expected, wrong, strict=True))
