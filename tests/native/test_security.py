"""Nothing is loaded, run or fetched but what belongs to the package."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

import lief
import mlx.core as mx
import pytest
from arrays import make_tensors
from host_metal.backend import Mock, load, load_from
from processes import run_python
from tables import NATIVE_OPTIONS

import mlx_adadelta
from mlx_adadelta.backend import extension

ROOT = Path(__file__).parents[2]
PACKAGE = Path(mlx_adadelta.__file__).parent
# The launcher for mlx-lm is a program: it reads and writes what it is told to.
SOURCES = sorted(set(PACKAGE.glob("*.py")) - {PACKAGE / "mlx_lm.py"})
NATIVE_SOURCES = sorted(x for x in (ROOT / "csrc").rglob("*") if x.is_file())
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs tests/host_metal")

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
    names = [path.stem for path in SOURCES if not path.stem.startswith("__")]
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


@on_linux
def test_a_metallib_elsewhere_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one beside the extension the embedded source is compiled."""
    package = tmp_path / "build" / "host_metal" / "package"
    package.mkdir(parents=True)
    shutil.copytree(ROOT / "metal", tmp_path / "metal")  # to compare with
    native = load_from(Path(shutil.copy(str(load().__file__), package)))
    for folder in (tmp_path, tmp_path / "current"):
        folder.mkdir(exist_ok=True)
        (folder / "mlx_adadelta.metallib").touch()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("DYLD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    mock = Mock(native)
    mock.start_record()
    w, g, v, u = make_tensors((3,))
    mx.eval(native.adadelta_update([w], [g], [v], [u], mx.array(0.5), **NATIVE_OPTIONS))
    event, _, where = mock.end_record()[0]
    assert (event, where) == ("library", "compiled")


# ------------------------------ What the package says -------------------------

# All that the package may import, and what it may use of those that can do harm.
IMPORTS = {
    *["mlx.core", "mlx.nn.layers.base", "mlx.optimizers", "mlx.utils"],
    *["__future__", "collections.abc", "contextlib", "dataclasses", "functools"],
    *["hashlib", "importlib", "itertools", "math", "numbers", "os", "pathlib"],
    *["platform", "re", "signal", "struct", "sys", "threading", "types", "typing"],
    "warnings",
}
USED = {"os": {"environ"}, "importlib": {"import_module"}}
FORBIDDEN = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_python_sources(path: Path) -> None:
    """No pickle, no code from data, no files, no network, no processes.

    The package lists its own folder, to find the extension for this MLX.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= IMPORTS
            assert {alias.asname or "mx" for alias in node.names} == {"mx"}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module in IMPORTS - USED.keys()
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr in USED.get(node.value.id, {node.attr}), node.lineno
            # mx.eval evaluates arrays; mx.load and mx.import_function read files.
            assert (node.value.id, node.attr) not in {
                ("mx", "load"),
                ("mx", "import_function"),
            }
            assert not re.search("^(read|write)_|^open$", node.attr), node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN, node.lineno


def calls(name: str) -> list[list[str]]:
    """The constant arguments of every call of a method of that name."""
    return [
        [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
    ]


def test_nothing_imports_the_launcher() -> None:
    assert not [x for x in SOURCES if re.search(r"import.*mlx_lm", x.read_text())]


def test_one_import_by_name_and_one_variable() -> None:
    assert calls("import_module") == [["._ext"]]
    text = "".join(path.read_text() for path in SOURCES)
    assert re.findall(r"os\.environ.*", text) == [
        'os.environ.get("MLX_ADADELTA_BACKEND") or "auto"'
    ]


CODE = r"\b(system|popen|exec[vl]\w*|fork|posix_spawn\w*|dlopen|getenv|socket|connect"
CODE += r"|fopen|open|tmpnam|mkstemp|current_path)\s*[({]|\b[io]?fstream\b"


@pytest.mark.parametrize("path", NATIVE_SOURCES, ids=lambda path: path.name)
def test_native_sources(path: Path) -> None:
    assert re.findall(CODE, path.read_text()) == []


@on_linux
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

BUILD_FILES = [
    ROOT / "CMakeLists.txt",
    ROOT / "pyproject.toml",
    *NATIVE_SOURCES,
    *(path for path in (ROOT / "scripts").iterdir() if path.is_file()),
]
FETCH = r"FetchContent|ExternalProject|file\s*\(\s*DOWNLOAD|\bcurl\b|\bwget\b"
FETCH += r"|\bgit\s+clone\b.*(://|@)|urllib|requests|urlopen|http\.client"


@pytest.mark.parametrize("path", BUILD_FILES, ids=lambda path: path.name)
def test_builds_fetch_nothing(path: Path) -> None:
    assert re.findall(FETCH, path.read_text()) == []


def test_pip_is_given_the_project_alone() -> None:
    """What it then installs are the dependencies that pyproject.toml declares."""
    setup = (ROOT / "scripts/_setup.sh").read_text().replace("\\\n", " ")
    [command] = re.findall(r"-m pip install (.*?)\)", setup)
    assert command.split()[-2:] == ["-e", '".[$extras]"']
