"""Without a usable extension: one warning, the same results, and the truth told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from arrays import make_tensors
from checks import is_exact
from processes import copy_package, run_python

import mlx_adadelta.__main__ as report
from mlx_adadelta import AdaDelta, adadelta_update, backends
from mlx_adadelta.backend import resolve_backend
from mlx_adadelta.options import MLX_VERSION

FAKE_EXTENSION = """
mlx_version = {version!r}
has_metal = False

def adadelta_update(*args, **kwargs):
    raise TypeError("adadelta_update(): incompatible function arguments")
"""

# How the extension is unusable, and what is said about it.
REASONS = {
    "missing": (None, "cannot be loaded: No module named 'mlx_adadelta._ext'"),
    "another mlx": (
        FAKE_EXTENSION.format(version="0.0.1"),
        f"built for mlx 0.0.1, but this is mlx {MLX_VERSION}",
    ),
    "another nanobind": (
        FAKE_EXTENSION.format(version=MLX_VERSION),
        "does not share types with mlx (built with another version of nanobind?): "
        "adadelta_update(): incompatible function arguments",
    ),
    "another libmlx": (
        "raise ImportError('_ext.so: undefined symbol: _ZN3mlx4core')",
        "cannot be loaded: _ext.so: undefined symbol: _ZN3mlx4core",
    ),
}

# A Mac, too, is to have no other kernels.
NO_METAL = "import mlx.core as mx; mx.metal.is_available = lambda: False; "


@pytest.fixture(params=REASONS)
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder with the package and no usable extension, and the reason."""
    source, reason = REASONS[request.param]
    package = copy_package(tmp_path)
    shutil.copytree(Path(__file__).parents[2] / "metal", package / "metal")
    if source is not None:
        (package / "_ext.py").write_text(source)
    return tmp_path, reason


def test_one_warning_says_why_and_what_to_do(broken: tuple[Path, str]) -> None:
    path, reason = broken
    code = "import mlx_adadelta, mlx_adadelta.optimizer; print(mlx_adadelta.backends())"
    done = run_python("-W", "always", "-c", NO_METAL + code, path=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('mlx',)"
    assert done.stderr.count("RuntimeWarning") == 1
    assert reason in done.stderr
    assert "builds the extension for the mlx installed" in done.stderr


def test_the_warning_can_be_made_an_error(broken: tuple[Path, str]) -> None:
    path, reason = broken
    code = NO_METAL + "import mlx_adadelta"
    done = run_python("-W", "error", "-c", code, path=path)
    assert done.returncode != 0
    assert reason in done.stderr


def test_there_is_no_warning_where_metal_is_there(broken: tuple[Path, str]) -> None:
    path, _ = broken
    metal = NO_METAL.replace("False", "True")
    code = "import mlx_adadelta; print(mlx_adadelta.backends())"
    done = run_python("-W", "error", "-c", metal + code, path=path)
    assert done.stderr == ""
    assert done.stdout.strip() == "('metal', 'mlx')"
    shutil.rmtree(path / "mlx_adadelta/metal")
    done = run_python("-W", "ignore", "-c", metal + code, path=path)
    assert done.stdout.strip() == "('mlx',)"


def test_a_backend_asked_for_by_name_is_refused(broken: tuple[Path, str]) -> None:
    path, reason = broken
    code = "import mlx_adadelta; mlx_adadelta.AdaDelta(1.0, backend='cpu')"
    done = run_python("-W", "ignore", "-c", code, path=path)
    assert done.returncode != 0
    assert "RuntimeError: backend 'cpu' cannot run here: the native ext" in done.stderr
    assert reason in done.stderr
    code = "import mlx_adadelta; mlx_adadelta.AdaDelta(1.0)"
    named = run_python(
        *("-W", "ignore", "-c", code), path=path, MLX_ADADELTA_BACKEND="cpu"
    )
    assert named.returncode != 0
    assert "RuntimeError: backend 'cpu' cannot run here" in named.stderr


def test_the_report_tells_the_truth(broken: tuple[Path, str]) -> None:
    path, reason = broken
    done = run_python("-W", "ignore", "-m", "mlx_adadelta", path=path)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    report = {name: rest for name, rest in lines if name in ("metal", "cpu", "mlx")}
    assert report.keys() == {"metal", "cpu", "mlx"}
    assert report["mlx"] == "works"
    assert report["cpu"].startswith("not usable: ")
    assert reason in report["cpu"]
    has_metal = mx.metal.is_available()
    assert ("through mx.fast.metal_kernel" in report["metal"]) == has_metal
    assert ("not usable: MLX has no Metal device" in report["metal"]) != has_metal
    assert "builds the extension for the mlx installed" in done.stdout


TRAIN = """
import sys
import mlx.core as mx, mlx_adadelta, numpy as np
# Not mx.load: of an .npz it leaves a Python file to MLX's stream thread to close,
# which aborts the process ("terminate called without an active exception") where
# Python is finalizing by then.
x = {name: mx.array(array) for name, array in np.load(sys.argv[1]).items()}
optimizer = mlx_adadelta.AdaDelta(lambda step: 1 / (1 + step), 0.95, 1e-5)
w = {"layers": [{"w": x["w"]}], "b": x["b"]}
for i in range(12):
    g = {"layers": [{"w": (x["g"] * (i - 4)).T}], "b": x["c"]}
    w = optimizer.apply_gradients(g, w)
state = optimizer.state
mx.savez(
    sys.argv[2], w=w["layers"][0]["w"], b=w["b"], step=state["step"],
    v=state["layers"][0]["w"]["v"], u=state["layers"][0]["w"]["u"],
)
"""


def test_results_are_the_kernels(broken: tuple[Path, str]) -> None:
    path, _ = broken
    inputs = path / "inputs.npz"
    w, g, *_ = make_tensors((33, 65))
    b, c, *_ = make_tensors((7,), seed=1)
    mx.savez(str(inputs), w=w, g=mx.contiguous(g.T), b=b, c=c)
    results = []
    for name, package in (("kernels", None), ("fallback", path)):
        output = path / f"{name}.npz"
        done = run_python(
            *("-W", "ignore", "-c", TRAIN, str(inputs), str(output)), path=package
        )
        assert done.returncode == 0, done.stderr
        results.append(np.load(output))
    kernels, fallback = results
    for name in ("w", "b", "v", "u", "step"):
        if is_exact(backends()[0]):
            np.testing.assert_array_equal(kernels[name], fallback[name], name)
        else:
            np.testing.assert_allclose(kernels[name], fallback[name], 1e-5, 1e-6)


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
