"""Builds and installs wheels."""

import os
import shlex
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Unoptimised builds take a sixth of the time. Debugging information is left out since
# it names this machine's folders.
UNOPTIMISED = ("CMAKE_BUILD_TYPE=Debug", "CMAKE_CXX_FLAGS_DEBUG=-O0 -DNDEBUG")


def attempt(
    *command: str | Path, cwd: Path | None = None, **environment: str
) -> tuple[int, str]:
    """Exit status and output, with Ninja and CMake of the Python packages."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {k: v for k, v in os.environ.items() if not k.startswith("MLX_ADADELTA")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=own | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """The output of a command that must not fail."""
    status, output = attempt(*command, cwd=cwd, **environment)
    assert status == 0, f"{shlex.join(map(str, command))}\n{output}"
    return output


def mlx_folder() -> Path:
    spec = find_spec("mlx")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def build_wheel(folder: Path) -> Path:
    build_type, flags = UNOPTIMISED
    run(
        *[sys.executable, "-m", "build", "--no-isolation", "--outdir", folder],
        f"-Cbuild-dir={folder / 'build'}",
        f"-Ccmake.build-type={build_type.partition('=')[2]}",
        f"-Ccmake.define.{flags}",
        ROOT,
        MLX_ADADELTA_REQUIRE_NATIVE="1",
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    run(
        *[sys.executable, "-m", "pip", "--disable-pip-version-check", "--python"],
        *[python, "install", "--quiet", "--no-deps", "--no-index", wheel],
    )
    [site] = folder.glob("lib/python*/site-packages")
    (site / "mlx").symlink_to(mlx_folder())
    return python
