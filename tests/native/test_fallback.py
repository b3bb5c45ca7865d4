"""Without a usable extension: one warning, the same results, and the truth told."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from arrays import make_tensors
from processes import copy_package, run_python

import mlx_adadelta.__main__ as report
from mlx_adadelta import AdaDelta, adadelta_update, backends
from mlx_adadelta.backend import resolve_backend
from mlx_adadelta.options import MLX_VERSION

ROOT = Path(__file__).parents[2]

# A file in the extension's place, its text, and what is said about it.
REASONS = {
    "missing": ("no.py", "", r"cannot be loaded: No module named 'mlx_adadelta\._ext'"),
    "damaged": ("_ext.so", "no library", r"cannot be loaded: .*_ext\.so"),
    "another nanobind": (
        "_ext.py",
        "def norm(*_, **k): raise TypeError('norm(): incompatible function arguments')",
        r"does not share types with mlx \(built with another version of nanobind\?\): "
        r"norm\(\): incompatible function arguments",
    ),
}

# Prints what is seen, as JSON. A Mac, too, is to have no other kernels.
REPORT = """
import contextlib, io, json, os, warnings
import mlx.core as mx
mx.metal.is_available = lambda: False
{before}
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import mlx_adadelta, mlx_adadelta.optimizer
from mlx_adadelta.__main__ import main

def refusal(**options):
    try:
        mlx_adadelta.AdaDelta(1.0, **options)
    except RuntimeError as error:
        return str(error)

g = mx.array([0.5, -2.0])
w = mlx_adadelta.AdaDelta(1.0).apply_gradients({{"w": g}}, {{"w": mx.zeros((2,))}})["w"]
with contextlib.redirect_stdout(io.StringIO()) as report:
    status = main()
named = refusal(backend="cpu")
os.environ["MLX_ADADELTA_BACKEND"] = "cpu"
print(json.dumps({{
    "warned": [[x.category.__name__, str(x.message)] for x in warned],
    "backends": mlx_adadelta.backends(),
    "refused": [named, refusal()],
    "w": w.tolist(),
    "report": report.getvalue().splitlines(),
    "status": status,
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
    for refused in seen["refused"]:
        assert refused.startswith("backend 'cpu' cannot run here: the native ext")
        assert re.search(reason, refused)
    # sqrt(1e-6) / sqrt(0.1 g^2 + 1e-6) * g: the same for both but the sign
    assert seen["w"] == pytest.approx([-0.0031622, 0.0031623], rel=1e-4)
    *_, metal, cpu, mlx, remedy = seen["report"]
    assert metal.split(maxsplit=1) == ["metal", "not usable: MLX has no Metal device"]
    assert cpu.split(maxsplit=1)[0] == "cpu"
    assert re.search(f"not usable: .*{reason}", cpu)
    assert mlx.split() == ["mlx", "works"]
    assert "builds the extension for the mlx installed" in remedy
    assert seen["status"] == 0


@pytest.mark.parametrize("name", REASONS)
def test_an_extension_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    file, text, reason = REASONS[name]
    (copy_package(tmp_path) / file).write_text(text)
    check_unusable(reason, tmp_path)


def test_another_mlx_at_run_time() -> None:
    """The extension that is really installed, and an mlx that says it is newer."""
    reason = f"was built for mlx {re.escape(MLX_VERSION)}, but this is mlx 0.99"
    check_unusable(reason, None, "mx.__version__ = '0.99.0'")


def test_there_is_no_warning_where_metal_is_there(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    shutil.copytree(ROOT / "metal", package / "metal")
    code = "import mlx.core as mx; mx.metal.is_available = lambda: True; "
    code += "import mlx_adadelta; print(mlx_adadelta.backends())"
    done = run_python("-W", "error", "-c", code, path=tmp_path)
    assert done.stderr == ""
    assert done.stdout.strip() == "('metal', 'mlx')"
    shutil.rmtree(package / "metal")
    done = run_python("-W", "ignore", "-c", code, path=tmp_path)
    assert done.stdout.strip() == "('mlx',)"


def test_the_table_of_releases() -> None:
    """pyproject.toml pins one of them, with its nanobind."""
    table = (ROOT / "csrc/mlx_releases.txt").read_text()
    releases = dict(re.findall(r"^([\d.]+) ([\d.]+)$", table, re.M))
    pins = (ROOT / "pyproject.toml").read_text()
    [pinned] = {*re.findall(r'"mlx(?:\[cpu\])?==([\d.]+)', pins)}
    assert {*re.findall(r'"nanobind==([\d.]+)', pins)} == {releases[pinned]}


# ----------------------------- With the extension -----------------------------


def test_the_report_with_every_backend_that_is_here() -> None:
    done = run_python("-W", "error", "-m", "mlx_adadelta")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in ("metal", "cpu", "mlx"):
        [line] = [x for x in done.stdout.splitlines() if x.split()[0] == name]
        assert line.endswith("works") == (name in backends())
    assert f"mlx {MLX_VERSION}" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
def test_the_report_ends_quietly_where_nobody_reads_on() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mlx_adadelta"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""


def test_the_report_says_how_metal_runs_without_an_extension(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "backends", lambda: ("metal", "mlx"))
    monkeypatch.setattr(report, "has_native", lambda _: False)
    monkeypatch.setattr(report, "_self_check", lambda _: True)
    assert report.main() == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if "metal " in x]
    assert line.endswith("works through mx.fast.metal_kernel; results take new memory")


def test_the_report_finds_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        report, "adadelta_update", lambda w, g, v, u, *_, **__: (w + 1e-3, v, u)
    )
    assert report.main() == 1


def test_the_environment_overrides_auto(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_ADADELTA_BACKEND", "mlx")
    assert resolve_backend("auto") == "mlx"
    assert resolve_backend(native) == native
    monkeypatch.setenv("MLX_ADADELTA_BACKEND", native)
    assert resolve_backend("auto") == native
    assert resolve_backend("mlx") == "mlx"
    for value in ("auto", ""):
        monkeypatch.setenv("MLX_ADADELTA_BACKEND", value)
        assert resolve_backend("auto") == native


def test_a_wrong_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ADADELTA_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"backend must be one of .* but is 'fast'"):
        AdaDelta(1.0)
    with pytest.raises(ValueError, match=r"backend must be one of .* but is 'fast'"):
        adadelta_update(*make_tensors((3,)), 1.0)
    AdaDelta(1.0, backend="mlx")


def test_backends_end_with_mlx() -> None:
    assert backends()[-1] == "mlx"
    assert set(backends()) <= {"metal", "cpu", "mlx"}
