"""Real shared libraries that cannot be used: said once and clearly, and done without.

What tests/test_fallback.py simulates in Python is here what the loader itself says.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from host_metal import build
from processes import copy_package, run_python

from mlx_adadelta.backend import extension
from mlx_adadelta.options import MLX_VERSION

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the libraries are made for Linux"
)

REPORT = """
import json, warnings
import mlx.core as mx
{before}
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import mlx_adadelta
try:
    mlx_adadelta.AdaDelta(1.0, backend="cpu")
    refused = ""
except RuntimeError as error:
    refused = str(error)
g = mx.array([0.5, -2.0])
w = mlx_adadelta.AdaDelta(1.0).apply_gradients({{"w": g}}, {{"w": mx.zeros((2,))}})["w"]
print(json.dumps({{
    "warned": [[x.category.__name__, str(x.message)] for x in warned],
    "backends": mlx_adadelta.backends(),
    "refused": refused,
    "w": w.tolist(),
}}))
"""


def check_unusable(reason: str, path: Path | None, before: str = "") -> None:
    """One warning that says why, right results all the same, and no pretence."""
    done = run_python("-c", REPORT.format(before=before), path=path)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    [[category, message]] = seen["warned"]
    assert category == "RuntimeWarning"
    assert re.search(reason, message)
    assert "builds the extension for the mlx installed" in message
    assert "\n" not in message
    assert seen["backends"] == ["mlx"]
    assert seen["refused"].startswith("backend 'cpu' cannot run here: ")
    assert re.search(reason, seen["refused"])
    # sqrt(1e-6) / sqrt(0.1 g^2 + 1e-6) * g: the same for both but the sign
    assert seen["w"] == pytest.approx([-0.0031622, 0.0031623], rel=1e-4)

    run = "import runpy; runpy.run_module('mlx_adadelta', run_name='__main__')"
    code = f"import mlx.core as mx\n{before}\n{run}"
    done = run_python("-W", "ignore", "-c", code, path=path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6  # whatever the loader says
    [line] = [x for x in lines if x.split()[0] == "cpu"]
    assert "not usable" in line
    assert re.search(reason, line)
    assert "builds the extension for the mlx installed" in done.stdout


def test_another_mlx_at_run_time() -> None:
    """The extension that is really installed, and an mlx that says it is newer."""
    assert extension is not None
    reason = f"was built for mlx {re.escape(MLX_VERSION)}, but this is mlx 0.99"
    check_unusable(reason, None, "mx.__version__ = '0.99.0'")


def compile_library(target: Path, source: str, *flags: str) -> None:
    subprocess.run(
        ["g++", "-x", "c", "-shared", "-fPIC", "-o", target, "-", "-x", "none", *flags],
        input=source,
        text=True,
        check=True,
    )


def truncate(target: Path) -> None:
    assert extension is not None
    whole = Path(str(extension.__file__)).read_bytes()
    target.write_bytes(whole[:100])


def link_to_a_missing_library(target: Path) -> None:
    gone = target.with_name("libgone.so")
    compile_library(gone, "void gone(void) {}")
    compile_library(target, "void gone(void); void PyInit__ext(void) { gone(); }", gone)
    gone.unlink()


def use_a_missing_symbol(target: Path) -> None:
    compile_library(target, "void gone(void); void PyInit__ext(void) { gone(); }")


def belong_to_another_module(target: Path) -> None:
    compile_library(target, "void PyInit_other(void) {}")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (truncate, r"cannot be loaded: .*(file too short|invalid|cannot)"),
    "a missing library": (
        link_to_a_missing_library,
        r"cannot be loaded: .*libgone\.so: cannot open shared object file",
    ),
    "a missing symbol": (
        use_a_missing_symbol,
        r"cannot be loaded: .*undefined symbol: gone",
    ),
    "another module": (
        belong_to_another_module,
        r"cannot be loaded: .*does not define module export function",
    ),
}


def package_with(tmp_path: Path, make: Callable[[Path], None]) -> Path:
    make(copy_package(tmp_path) / Path(build.extension_path()).name)
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_a_library_that_cannot_be_loaded(name: str, tmp_path: Path) -> None:
    make, reason = BROKEN[name]
    check_unusable(reason, package_with(tmp_path, make))


@pytest.mark.long
def test_another_nanobind(tmp_path: Path) -> None:
    """A build that shares no types with MLX's module, as another ABI of nanobind."""
    build.build("limits/limits", build.extension_path())
    ninja = (build.ROOT / build.BUILD / "build.ninja").read_text()
    link = re.search(
        r"^build .*/extension/_ext\S*: link (.*)\n  flags = (.*)$", ninja, re.M
    )
    assert link is not None
    objects = link[1].split()
    flags = re.search(r"/bindings\.o: .*\n.*\n  flags = (.*)$", ninja, re.M)
    assert flags is not None
    nanobind = f"{build.BUILD}/nb_combined.cpp"
    sources = {"bindings.o": "csrc/bindings.cpp", "nb_combined.o": nanobind}
    for name, source in sources.items():
        target = tmp_path / name
        changed = shlex.split(flags[1].replace("NB_DOMAIN=mlx", "NB_DOMAIN=other"))
        build.run(["g++", *build.CPP, *changed, "-c", source, "-o", str(target)])
        objects = [str(target) if x.endswith(name) else x for x in objects]

    def make(target: Path) -> None:
        build.run(["g++", *objects, "-o", str(target), *shlex.split(link[2])])

    reason = r"does not share types with mlx \(built with another version of nanobind"
    (tmp_path / "path").mkdir()
    check_unusable(reason, package_with(tmp_path / "path", make))


def test_the_table_of_releases() -> None:
    """pyproject.toml pins one of them, with its nanobind."""
    table = (build.ROOT / "csrc/mlx_releases.txt").read_text()
    releases = dict(re.findall(r"^([\d.]+) ([\d.]+)$", table, re.M))
    pins = (build.ROOT / "pyproject.toml").read_text()
    [pinned] = {*re.findall(r'"mlx(?:\[cpu\])?==([\d.]+)', pins)}
    assert {*re.findall(r'"nanobind==([\d.]+)', pins)} == {releases[pinned]}
