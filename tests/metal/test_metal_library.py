"""CMake's option MLX_ADADELTA_METALLIB, with a program in place of Apple's xcrun."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from host_metal import build

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac has the real xcrun"
)

# A project with this package in it, and an MLX that says it was built with Metal.
PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(vendoring LANGUAGES CXX)
add_library(mlx INTERFACE)
set(MLX_BUILD_METAL ON)
include("{mlx}/share/cmake/MLX/extension.cmake")
set(MLX_ADADELTA_BUILD_MODULE OFF)
set(MLX_ADADELTA_METALLIB {option})
add_subdirectory("{root}" "${{PROJECT_BINARY_DIR}}/adadelta")
"""
# Logs its arguments and writes what it is told to, or fails. Ninja runs several at
# once: each writes its line in one piece.
XCRUN = """#!/bin/sh
line=$(printf '%s\t' "$@")
printf '%s\n' "$line" >>"{folder}/log"
[ -e "{folder}/no-toolchain" ] && exit 1
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && : >"$2"
  [ "$1" = -MF ] && : >"$2"
  shift
done
"""
TARGET = "mlx_adadelta_metallib"


Targets = Callable[[str], str]


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Targets:
    """Configures the project with the option; returns what it can build."""
    xcrun = tmp_path / "bin/xcrun"
    xcrun.parent.mkdir()
    xcrun.write_text(XCRUN.format(folder=tmp_path))
    xcrun.chmod(0o755)
    monkeypatch.setenv("PATH", str(xcrun.parent), prepend=":")

    def configure(option: str) -> str:
        mlx = build.find_package("mlx")
        text = PROJECT.format(mlx=mlx, root=build.ROOT, option=option)
        (tmp_path / "CMakeLists.txt").write_text(text)
        ninja = Path(sys.executable).with_name("ninja")
        cmake = [sys.executable, "-m", "cmake", "-S", str(tmp_path), "-G", "Ninja"]
        cmake += ["-B", str(tmp_path / "build"), f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        build.run([*cmake, f"-DPython_EXECUTABLE={sys.executable}"])
        return build.run([str(ninja), "-C", str(tmp_path / "build"), "-t", "targets"])

    return configure


def test_kernels_are_compiled_and_linked(targets: Targets, tmp_path: Path) -> None:
    assert TARGET in targets("ON")
    ninja = Path(sys.executable).with_name("ninja")
    subprocess.run([ninja, "-C", tmp_path / "build", TARGET], check=True)
    log = (tmp_path / "log").read_text().splitlines()
    version, *compiled, linked = (line.strip("\t").split("\t") for line in log)
    assert version == ["-sdk", "macosx", "metal", "--version"]
    sources = set()
    for command in compiled:
        assert command[:3] == linked[:3] == ["-sdk", "macosx", "metal"]
        for argument in (
            f"-I{build.ROOT}/metal",
            "-fno-fast-math",
            "-mmacosx-version-min=14.0",
        ):
            assert argument in command
        assert command[-1] in linked
        sources |= {x for x in command if x.endswith(".metal")}
    assert sources == {f"{build.ROOT}/metal/{x}.metal" for x in ("adadelta", "norm")}
    assert linked[-1] == str(tmp_path / "build/adadelta/mlx_adadelta.metallib")
    assert Path(linked[-1]).exists()


def test_without_a_toolchain_mlx_compiles_them(
    targets: Targets, tmp_path: Path
) -> None:
    (tmp_path / "no-toolchain").touch()
    assert TARGET not in targets("ON")


def test_they_can_be_left_to_mlx(targets: Targets, tmp_path: Path) -> None:
    assert TARGET not in targets("OFF")
    assert not (tmp_path / "log").exists()
