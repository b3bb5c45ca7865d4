"""Installs the package in every way that docs/install.md lists, and runs it.

    scripts/check_install [PYTHON...]

PYTHON is an interpreter; with the first (default: the one that runs this) every way
is tried, with the others a wheel. What is committed is installed; dependencies come
from the index that pip is set to. One native build for each interpreter and three more,
unoptimised: some minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A program of a user's, which fails where results are wrong.
PROGRAM = """
import mlx.core as mx, mlx.optimizers, mlx_adadelta
mx.set_default_device(mx.cpu)
print(*mlx_adadelta.backends())
w, g = {"w": mx.array([1.0, -2.0])}, {"w": mx.array([0.3, -0.1])}
new, stock = mlx_adadelta.AdaDelta(1.0), mlx.optimizers.AdaDelta(1.0)
for _ in range(3):
    w, old = new.apply_gradients(g, w), stock.apply_gradients(g, w)
    assert mx.array_equal(w["w"], old["w"])
"""
EVERY_BACKEND = "metal cpu mlx" if sys.platform == "darwin" else "cpu mlx"
NATIVE = {"MLX_ADADELTA_REQUIRE_NATIVE": "1"}
UNOPTIMISED = {**NATIVE, "SKBUILD_CMAKE_BUILD_TYPE": "Debug"}


class InstallError(Exception):
    """What went wrong, with all output."""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Runs a command; its output, or an error that quotes all of it."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith("MLX_ADADELTA")
    }
    done = subprocess.run(
        command,
        cwd=cwd,
        env=inherited | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise InstallError(f"{shlex.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def pinned(name: str) -> str:
    """A build requirement of pyproject.toml."""
    found = re.search(rf'"({name}[=>][^";]*)', (ROOT / "pyproject.toml").read_text())
    if found is None:
        raise InstallError(f"pyproject.toml: no build requirement {name}")
    return found[1]


class Environment:
    """A fresh virtual environment with MLX."""

    def __init__(self, folder: Path, python: str) -> None:
        run(python, "-m", "venv", folder)
        self.python = folder / "bin/python"
        self.folder = folder
        self.pip("install", "--quiet", pinned("mlx").replace("mlx=", "mlx[cpu]="))
        self.before = self.files()

    def files(self) -> set[Path]:
        return {x for x in self.folder.rglob("*") if "__pycache__" not in x.parts}

    def pip(self, *arguments: str | Path, **environment: str) -> None:
        run(self.python, "-m", "pip", *arguments, **environment)

    def install(self, *arguments: str | Path, **environment: str) -> None:
        self.pip("install", "--quiet", *arguments, **environment)

    def check(self, backends: str) -> None:
        """Runs the installed package, takes it away and looks for what is left."""
        where = self.folder
        found = run(self.python, "-W", "ignore", "-c", PROGRAM, cwd=where).strip()
        if found != backends:
            raise InstallError(f"the backends are {found}, not {backends}")
        report = run(self.python, "-W", "ignore", "-m", "mlx_adadelta", cwd=where)
        if "WRONG" in report:
            raise InstallError(report)
        self.pip("uninstall", "--quiet", "--yes", "mlx-adadelta")
        left = self.files() - self.before
        if left:
            raise InstallError(f"uninstalling left {sorted(map(str, left))}")


def path_without_compiler(folder: Path) -> str:
    """A PATH with nothing but what a shell script needs."""
    folder.mkdir()
    for name in ("sh", "uname", "env"):
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    return str(folder)


def every_way(folder: Path, checkout: Path, python: str) -> None:
    def environment(name: str) -> Environment:
        return Environment(folder / f"{name} environment", python)

    def from_checkout() -> None:
        here = environment("checkout")
        here.install(checkout, **UNOPTIMISED)
        here.check(EVERY_BACKEND)

    def from_sdist() -> None:
        here = environment("sdist")
        here.install("build")
        run(here.python, "-m", "build", "--sdist", "-o", folder / "sdist", checkout)
        [sdist] = (folder / "sdist").iterdir()
        here.before = here.files()
        here.install(sdist, **UNOPTIMISED)
        here.check(EVERY_BACKEND)

    def editable_without_network() -> None:
        here = environment("editable")
        tools = [pinned("scikit-build-core"), pinned("nanobind"), "cmake", "ninja"]
        here.install(*tools)
        here.before = here.files()
        path = f"{here.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        offline = ("--no-index", "--no-build-isolation")
        here.install(*offline, "--editable", checkout, PATH=path, **UNOPTIMISED)
        here.check(EVERY_BACKEND)

    def without_compiler() -> None:
        here = environment("fallback")
        bare = {"PATH": path_without_compiler(folder / "bin"), "CC": "", "CXX": ""}
        here.install(checkout, **bare)
        here.check("mlx")
        try:
            here.install(checkout, **bare, **NATIVE)
        except InstallError as error:
            if "CMAKE_CXX_COMPILER" not in str(error):
                raise
        else:
            raise InstallError("without a compiler the mandatory native part was built")

    attempt("from a git checkout", from_checkout)
    attempt("from the sdist", from_sdist)
    attempt("editable, without network or build isolation", editable_without_network)
    attempt("without a compiler: MLX operations, or an error", without_compiler)


def wheel(folder: Path, checkout: Path, python: str) -> None:
    """Built as for a release, installed without network."""
    here = Environment(folder / "wheel environment", python)
    here.pip("wheel", "--quiet", "--no-deps", "-w", here.folder, checkout, **NATIVE)
    [file] = here.folder.glob("*.whl")
    here.before = here.files()
    here.install("--no-index", "--no-deps", file)
    here.check(EVERY_BACKEND)


def attempt(name: str, way: Callable[[], None]) -> None:
    print(f"{name} ... ", end="", flush=True)
    way()
    print("works", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/check_install",
        description="Installs the package in every way and runs it; takes minutes.",
    )
    parser.add_argument("interpreters", metavar="PYTHON", nargs="*")
    interpreters = parser.parse_args().interpreters or [sys.executable]
    try:
        with tempfile.TemporaryDirectory(prefix="check install ") as name:
            checkout = Path(name, "check out")
            run("git", "clone", "--quiet", "--no-hardlinks", ROOT, checkout)
            for i, python in enumerate(interpreters):
                version = run(python, "--version").strip()
                folder = Path(name, version)
                attempt(f"a wheel, {version}", partial(wheel, folder, checkout, python))
                if i == 0:
                    every_way(folder, checkout, python)
    except InstallError as error:
        print(f"failed\nerror: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
