"""What runs when the package is imported and used: its own files, nothing else."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/mlx_adadelta"

# All that the package needs; a new one is to be looked at here.
IMPORTS = {
    *("__future__", "collections.abc", "contextlib", "dataclasses"),
    *("importlib", "importlib.metadata"),
    *("math", "mlx.core", "mlx.nn.layers.base", "mlx.optimizers", "mlx.utils"),
    *("numbers", "os", "platform", "sys", "types", "typing", "warnings"),
}
EXECUTES = {"eval", "exec", "compile", "__import__", "open", "system", "popen"}


def names_called(tree: ast.AST) -> set[str]:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    # mx.eval is no eval.
    return names | {
        call.attr
        for call in calls
        if isinstance(call, ast.Attribute)
        and not (isinstance(call.value, ast.Name) and call.value.id == "mx")
    }


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda x: x.name)
def test_the_package_opens_and_executes_nothing(file: Path) -> None:
    tree = ast.parse(file.read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(str(node.module))
    assert imported <= IMPORTS
    assert not names_called(tree) & EXECUTES


def test_one_environment_variable_is_read() -> None:
    source = "".join(file.read_text() for file in PACKAGE.glob("*.py"))
    assert re.findall(r"environ[\.\[]\S*|getenv", source) == [
        'environ.get("MLX_ADADELTA_BACKEND",'
    ]
    native = "".join(file.read_text() for file in (ROOT / "csrc").glob("*.*"))
    assert not re.search(r"getenv|dlopen|system\(|popen|fopen|fstream", native)


def test_the_build_fetches_nothing() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    assert not re.search(r"FetchContent|ExternalProject|DOWNLOAD|https?:", text)


def test_files_in_the_current_directory_are_not_loaded(tmp_path: Path) -> None:
    names = [file.stem for file in PACKAGE.glob("*.py")] + ["_ext"]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"print('executed {name}')")
    (tmp_path / "mlx_adadelta.metallib").write_text("not a library")
    update = (
        "import mlx.core as mx, mlx_adadelta; w = {'w': mx.ones((3,))}; "
        "mx.eval(mlx_adadelta.AdaDelta(1.0).apply_gradients(w, w)); print('done')"
    )
    for arguments in (["-c", update], ["-m", "mlx_adadelta"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "executed" not in done.stdout
        assert done.stdout


def test_the_environment_names_a_backend_and_no_file(tmp_path: Path) -> None:
    evil = tmp_path / "evil.py"
    evil.write_text("print('executed')")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import mlx_adadelta; mlx_adadelta.AdaDelta(1.0)",
        ],
        env={**os.environ, "MLX_ADADELTA_BACKEND": str(evil)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "executed" not in done.stdout
    assert f"must be one of auto, metal, cpu, mlx but is '{evil}'" in done.stderr
