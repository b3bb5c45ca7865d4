"""Copies in another project, as docs/vendoring.md describes them."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import lief
import numpy as np
import pytest
from packaging_tools import ROOT, UNOPTIMISED, attempt, mlx_folder, run
from reference import adadelta_step

import mlx_adadelta

# ------------------------------- scripts/vendor -------------------------------


VENDOR = ROOT / "scripts/vendor"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    destination = tmp_path / "third party" / "mlx_adadelta"
    run(VENDOR, destination)
    return destination


def test_the_manifest(copy: Path) -> None:
    manifest = json.loads((copy / "VENDORED.json").read_text())
    assert manifest["version"] == mlx_adadelta.__version__
    assert re.match("[0-9a-f]{40}|unknown", manifest["commit"])
    files = {x.relative_to(copy).as_posix() for x in copy.rglob("*") if x.is_file()}
    assert set(manifest["files"]) == files - {"VENDORED.json"}
    for name in files - {"VENDORED.json"}:
        assert (copy / name).read_bytes() == (ROOT / name).read_bytes()


def test_drift_is_reported_and_not_overwritten(copy: Path) -> None:
    cache = copy / "python/mlx_adadelta/__pycache__"
    cache.mkdir()
    (cache / "optimizer.cpython-311.pyc").write_bytes(b"")
    assert attempt(VENDOR, "--check", copy) == (0, f"{copy}: as it was copied\n")

    (copy / "csrc/layout.cpp").write_text("// patched\n")
    (copy / "LICENSE").unlink()
    (copy / "csrc/more.cpp").write_text("")
    drift = "missing LICENSE\nchanged csrc/layout.cpp\nextra   csrc/more.cpp\n"
    assert attempt(VENDOR, "--check", copy) == (1, drift)
    status, output = attempt(VENDOR, copy)
    assert status == 2
    assert f"was changed since it was made:\n{drift}" in output
    assert (copy / "csrc/layout.cpp").read_text() == "// patched\n"


def test_an_update_replaces_an_unchanged_copy(copy: Path) -> None:
    manifest = json.loads((copy / "VENDORED.json").read_text())
    # The copy is of a version with one more file and another licence.
    (copy / "csrc/old.cpp").write_text("")
    (copy / "LICENSE").write_text("old")
    for name in ("csrc/old.cpp", "LICENSE"):
        contents = (copy / name).read_bytes()
        manifest["files"][name] = hashlib.sha256(contents).hexdigest()
    (copy / "VENDORED.json").write_text(json.dumps(manifest))
    run(VENDOR, copy)
    assert not (copy / "csrc/old.cpp").exists()
    assert (copy / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    run(VENDOR, "--check", copy)


@pytest.mark.parametrize("manifest", [None, "", "{}"])
def test_other_folders_are_left_alone(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "VENDORED.json").write_text(manifest)
    before = set(tmp_path.iterdir())
    for arguments in ([tmp_path], ["--check", tmp_path]):
        status, output = attempt(VENDOR, *arguments)
        assert status == 2
        assert f"error: {tmp_path} is not a copy: " in output
    assert set(tmp_path.iterdir()) == before


# ------------------------------ In a host project ------------------------------

PACKAGE = "acme/optim/adadelta"

# The host's project() includes this; deferred calls run at the end of the project.
SNAPSHOT = """
function(list_variables file)
  get_cmake_property(names VARIABLES)
  file(WRITE "${CMAKE_BINARY_DIR}/${file}" "")
  foreach(name IN LISTS names)
    string(REGEX REPLACE "[\\r\\n]" " " value "${${name}}")
    file(APPEND "${CMAKE_BINARY_DIR}/${file}" "${name}=${value}\\n")
  endforeach()
endfunction()
function(list_targets)
  get_property(targets DIRECTORY third_party/mlx_adadelta
               PROPERTY BUILDSYSTEM_TARGETS)
  file(WRITE "${CMAKE_BINARY_DIR}/targets" "${targets}")
endfunction()
list_variables(before)
cmake_language(DEFER CALL list_variables after)
cmake_language(DEFER CALL list_targets)
"""


def code_block(language: str) -> str:
    text = (ROOT / "docs/vendoring.md").read_text()
    [block] = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return block


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documented project, built unoptimised and installed into site/."""
    folder = tmp_path_factory.mktemp("host")
    run(VENDOR, folder / "third_party/mlx_adadelta")
    (folder / "CMakeLists.txt").write_text(code_block("cmake"))
    (folder / "example.cpp").write_text(code_block("cpp"))
    (folder / "snapshot.cmake").write_text(SNAPSHOT)
    cmake = [sys.executable, "-m", "cmake"]
    run(
        *[*cmake, "-G", "Ninja", "-S", folder, "-B", folder / "build"],
        *[f"-D{setting}" for setting in UNOPTIMISED],
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_PROJECT_acme_INCLUDE={folder / 'snapshot.cmake'}",
    )
    run(*cmake, "--build", folder / "build")
    site = folder / "site"
    run(*cmake, "--install", folder / "build", "--prefix", site)
    (site / "mlx").symlink_to(mlx_folder())
    return folder


def test_nothing_global_is_set(host: Path) -> None:
    before, after = (
        dict(
            line.split("=", 1)
            for line in (host / "build" / x).read_text().split("\n")[:-1]
        )
        for x in ("before", "after")
    )
    kept = [k for k in before if re.match("CMAKE_(?!CURRENT_)", k)]
    assert {k: after[k] for k in kept} == {k: before[k] for k in kept}
    found = "MLX_(DIR|LIBRARY)|nanobind_DIR|NB_.*|_?Python_.*|FIND_PACKAGE_.*"
    expected = re.compile(f"{found}|MLX_ADADELTA_.*|mlx_adadelta_.*", re.DOTALL)
    new = after.keys() - before.keys()
    assert [name for name in new if not expected.fullmatch(name)] == []
    targets = (host / "build/targets").read_text().split(";")
    assert "mlx_adadelta" in targets
    assert [x for x in targets if not re.match("mlx_adadelta|nanobind", x)] == []


def test_what_is_installed(host: Path) -> None:
    site = host / "site"
    package = site / PACKAGE
    names = {path.name for path in package.iterdir()}
    source = ROOT / "python/mlx_adadelta"
    assert names >= {x.name for x in source.glob("*.py")} | {"py.typed"}
    assert names >= {"_ext.pyi"}
    assert {x.name for x in site.iterdir()} == {"acme", "mlx"}
    [module] = package.glob("mlx-*/_ext.*.so")
    rpath = rb"(\$ORIGIN|@loader_path)/\.\./\.\./\.\./\.\./mlx/lib\0"
    assert re.search(rpath, module.read_bytes())


def test_the_module_exports_no_symbols_of_ours(host: Path) -> None:
    """Otherwise the dynamic linker could mix two copies."""
    [module] = (host / "site" / PACKAGE).glob("mlx-*/_ext.*.so")
    binary = lief.parse(module)
    assert isinstance(binary, (lief.ELF.Binary, lief.MachO.Binary))
    exported = {str(x.name) for x in binary.exported_symbols}
    assert any("PyInit__ext" in name for name in exported)
    assert [name for name in exported if "12mlx_adadelta" in name] == []


def run_python(code: str, path: Path) -> list[str]:
    """The lines that code prints, with the packages in path."""
    output = run(
        *[sys.executable, "-W", "error", "-c", code],
        cwd=path,
        PYTHONPATH=str(path),
    )
    return output.splitlines()


def test_the_vendored_package_runs_native(host: Path) -> None:
    code = """
import sys
sys.modules["mlx_adadelta"] = None  # not to be imported
import acme.optim.adadelta as vendored
print(vendored.backends(), vendored.__version__)
print(vendored.backend.extension.__name__)
"""
    assert run_python(code, host / "site") == [
        f"{mlx_adadelta.backends()} {mlx_adadelta.__version__}",
        "acme.optim.adadelta._ext",
    ]
    report = run(
        *[sys.executable, "-W", "error", "-m", "acme.optim.adadelta"],
        cwd=host / "site",
    )
    assert re.search("cpu +works", report)


TWO_COPIES = """
import io
import mlx.core as mx
import acme.optim.adadelta as vendored
import mlx_adadelta as installed

mx.set_default_device(mx.cpu)
assert vendored.backend.extension is not installed.backend.extension
w, g = mx.arange(300.0), mx.sin(mx.arange(300.0))

def train(*packages):
    x = {"w": w}
    optimizers = [package.AdaDelta(1.0, backend="cpu") for package in packages]
    for i in range(6):
        optimizer = optimizers[i % len(optimizers)]
        if i and len(optimizers) > 1:
            optimizer.state = optimizers[(i - 1) % len(optimizers)].state
        x = optimizer.apply_gradients({"w": g * (i + 1)}, x)
    return x["w"]

alone = train(installed)
for packages in ((vendored,), (installed, vendored), (vendored, installed)):
    assert mx.array_equal(train(*packages), alone), packages

def count_updates(*packages):
    @mx.compile
    def total(w, g, v, u):
        return sum(p.adadelta_update(w, g, v, u, 1.0)[0] for p in packages)
    zeros = mx.zeros_like(w)
    graph = io.StringIO()
    mx.export_to_dot(graph, total(w, g, zeros, zeros))
    return graph.getvalue().count('"AdaDeltaUpdate"')

# MLX merges equal updates of one copy; another copy may be another version.
print(count_updates(installed, installed), count_updates(vendored, vendored))
print(count_updates(installed, vendored), count_updates(vendored, installed))
"""


def test_two_copies_in_one_process(host: Path) -> None:
    assert run_python(TWO_COPIES, host / "site") == ["1 1", "2 2"]


def test_the_example_in_cpp(host: Path) -> None:
    output = run(host / "build/example")
    printed = np.array(
        [
            [float(x) for x in numbers.split(",")]
            for numbers in re.findall(r"array\(\[(.*?)\]", output)
        ]
    )
    w, v, u = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    g = np.array([0.3, -0.1, 0.0])
    for _ in range(3):
        w, v, u = adadelta_step(w, g, v, u, 1.0, 0.95, 1e-6)
    np.testing.assert_allclose(printed, [w, v, u], 1e-5)  # printed to 6 digits


# ------------------------------ The Python alone -------------------------------

ALONE = """
import sys, warnings
sys.modules["mlx_adadelta"] = None  # not to be imported
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import acme.optim._vendor.mlx_adadelta as vendored
assert len(caught) == 1, caught
missing = "No module named 'acme.optim._vendor.mlx_adadelta._ext'"
assert missing in str(caught[0].message)
assert vendored.backends() == ("mlx",)
import mlx.core as mx
mx.set_default_device(mx.cpu)
one = {"w": mx.array(1.0)}
print(vendored.AdaDelta(1.0).apply_gradients(one, one)["w"].item())
"""


def test_the_python_files_alone_under_another_name(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(
        copy / "python/mlx_adadelta", tmp_path / "acme/optim/_vendor/mlx_adadelta"
    )
    [line] = run_python(ALONE, tmp_path)
    assert float(line) == pytest.approx(1 - 1e-5**0.5, rel=1e-5)
