"""Nothing is loaded, run or fetched but what belongs to the package."""

import ast
import re
import sys
from pathlib import Path

import lief
import pytest
from processes import run_python

import mlx_adadelta
from mlx_adadelta.backend import extension

ROOT = Path(__file__).parents[2]
PACKAGE = Path(mlx_adadelta.__file__).parent

# -------------------------------- What is loaded ------------------------------

# Leaves a trace when it is imported, whatever its name.
DECOY = "import os; open(os.environ['TRACE'], 'a').write(__file__)\n"
USE = """
import mlx_adadelta, mlx.core as mx
from mlx_adadelta.backend import extension
w = {"w": mx.ones((40, 30))}
optimizer = mlx_adadelta.AdaDelta(1.0)
mx.eval(optimizer.apply_gradients(w, w), optimizer.state)
print(mlx_adadelta.__file__)
print(extension.__file__)
"""


def test_decoys_are_not_loaded(tmp_path: Path) -> None:
    """The current directory comes first on sys.path, and holds all our names."""
    names = [x.stem for x in PACKAGE.glob("*.py") if not x.stem.startswith("__")]
    for name in (*names, "_ext", "metal_source"):
        (tmp_path / f"{name}.py").write_text(DECOY)
    assert extension is not None
    native = Path(str(extension.__file__))
    for name in (native.name, "mlx_adadelta.metallib", "libmlx.so", "libmlx.dylib"):
        (tmp_path / name).write_bytes(b"no such thing")
    trace = tmp_path / "trace"
    environment = {"TRACE": str(trace), "MLX_ADADELTA_EXT": str(tmp_path)}
    done = run_python("-c", USE, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [Path(line).parent for line in done.stdout.splitlines()] == [
        PACKAGE,
        native.parent,
    ]
    assert not trace.exists()


# ------------------------------ What the package says -------------------------

IMPORTS = {
    *["importlib", "hashlib", "math", "mlx.core as mx", "mlx.optimizers", "os"],
    *["platform", "re", "signal", "struct", "sys", "warnings"],
}
IMPORTS_FROM = {
    *["collections.abc", "ctypes", "dataclasses", "functools", "itertools"],
    *["mlx.nn.layers.base", "mlx.utils", "numbers", "pathlib", "threading", "types"],
    "typing",
}
# Code from data, files and libraries, by names or methods.
HARMFUL = r"eval|exec|compile|__import__|input|breakpoint|\w*DLL"
HARMFUL += r"|mx\.(load|import_function)|(.*\.)?(open|(read|write)_\w+)"


def test_python_sources() -> None:
    """One variable, one import by name, and no file but Metal's sources.

    The launcher for mlx-lm is a program: it reads and writes what it is told to.
    """
    files = set(PACKAGE.glob("*.py")) - {PACKAGE / "mlx_lm.py"}
    text = "".join(x.read_text() for x in sorted(files))
    nodes = list(ast.walk(ast.parse(text)))
    whole = [ast.unparse(x.names) for x in nodes if isinstance(x, ast.Import)]
    assert set(whole) <= IMPORTS
    parts = [x for x in nodes if isinstance(x, ast.ImportFrom) and not x.level]
    assert {x.module for x in parts} <= IMPORTS_FROM
    assert "mlx_lm" not in text
    names = [ast.unparse(x) for x in nodes if isinstance(x, ast.Name | ast.Attribute)]
    assert [x for x in names if re.fullmatch(HARMFUL, x)] == [
        "(folder() or Path('metal')).joinpath(name).read_text"
    ]
    assert re.findall(r"\b(?:os|importlib)\..*", text) == [
        'importlib.import_module("._ext", __package__)',
        'os.environ.get("MLX_ADADELTA_BACKEND") or "auto"',
    ]


CODE = r"\b(system|popen|exec[vl]\w*|fork|posix_spawn\w*|dlopen|getenv|socket|connect"
CODE += r"|fopen|open|tmpnam|mkstemp|current_path)\s*[({]|\b[io]?fstream\b"


def test_native_sources() -> None:
    """All of them: the extension below has no Metal path on Linux."""
    files = [x for x in (ROOT / "csrc").rglob("*") if x.is_file()]
    assert "eval_metal.cpp" in {x.name for x in files}
    assert re.findall(CODE, "".join(x.read_text() for x in files)) == []


# ------------------------------- What can be called ---------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="a Mac's are not ELF")
def test_native_symbols() -> None:
    """The extension cannot start a process, open a connection or a library."""
    assert extension is not None
    native = lief.ELF.parse(str(extension.__file__))
    assert native is not None
    names = {str(symbol.name) for symbol in native.imported_symbols}
    assert "PyModule_Create2" in names or len(names) > 100  # they have been read
    harmful = r"system|popen|exec\w*|fork|v?fork|posix_spawn\w*|dlopen|dlmopen|getenv"
    harmful += r"|secure_getenv|socket|connect|fopen(64)?|open(64)?|mkstemp\w*"
    harmful += r"|.*basic_[io]?f(stream|ilebuf).*"
    assert {name for name in names if re.fullmatch(harmful, name)} == set()


# ------------------------------ What a build fetches --------------------------

FETCH = r"FetchContent|ExternalProject|file\s*\(\s*DOWNLOAD|\bcurl\b|\bwget\b"
FETCH += r"|\bgit\s+clone\b.*(://|@)|urllib|requests|urlopen|http\.client"


def test_builds_fetch_nothing() -> None:
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file()]
    for path in (ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", *scripts):
        assert re.findall(FETCH, path.read_text()) == [], path


def test_pip_is_given_the_project_alone() -> None:
    """What it then installs are the dependencies that pyproject.toml declares."""
    setup = (ROOT / "scripts/_setup.sh").read_text().replace("\\\n", " ")
    [command] = re.findall(r"-m pip install (.*?)\)", setup)
    assert command.split()[-2:] == ["-e", '".[$extras]"']
