"""scripts/mac, on Linux: the steps, the report and failures, with mocked programs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
METALLIB = ".venv/mlx_adadelta.metallib"

# Stands for every program: prints its name and arguments, and fails where told to.
PROGRAM = """#!/usr/bin/env bash
name=$(basename -- "$0")
case "$*" in
  *device_info*) echo '{"MLX": "1.2.3", "device_name": "Apple M9"}'; exit 0 ;;
esac
echo "$name $* ${CMAKE_ARGS:-} $([ -e METALLIB ] && echo library)"
case "$name $*" in
  *--version*) [ -e no-toolchain ] && exit 1 ;;
  "bench "*)
    mkdir -p "$4"
    echo '{"cases": [28]}' >"$4/bench.json"
    echo 'figures' >"$4/bench.md" ;;
esac
for failing in $(cat failing 2>/dev/null); do
  case "$name $*" in *"$failing"*) echo "$failing broke"; exit 3 ;; esac
done
exit 0
""".replace("METALLIB", METALLIB)


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script in a tree of mocked programs, on what says that it is a Mac."""
    for folder in ("scripts", ".venv/bin", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SCRIPTS / "mac.py", tmp_path / "scripts")
    programs = ["bin/xcrun", "bin/sysctl", "bin/sw_vers", "bin/xcodebuild", "bin/git"]
    programs += [f"scripts/{name}" for name in ("test", "bench", "tune", "train")]
    for program in [*programs, ".venv/bin/python"]:
        (tmp_path / program).write_text(PROGRAM)
        (tmp_path / program).chmod(0o755)
    (tmp_path / METALLIB).touch()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.chdir(tmp_path)
    spec = spec_from_file_location("mac", tmp_path / "scripts/mac.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mac", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "darwin")
    return module


def results(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "report.json").read_text())
    return {step["name"]: step["result"] for step in record["steps"]}


def test_all_goes_well(mac: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert mac.main(["--quick", "--out", str(out)]) == 0
    assert set(results(out).values()) == {"passed"}
    record = json.loads((out / "report.json").read_text())
    assert record["benchmark"] == {"cases": [28]}
    assert record["machine"]["chip"].startswith("sysctl -n machdep.cpu.brand_string")
    assert record["machine"]["macOS"].startswith("sw_vers")
    assert record["machine"]["MLX"] == "1.2.3"
    assert record["machine"]["device_name"] == "Apple M9"
    markdown = (out / "report.md").read_text()
    for text in ("| compile | passed |", "figures", "tune --quick", "| chip | sysctl"):
        assert text in markdown
    # Compiled ahead of time in the first run, at run time in the second.
    ahead, later = (next(out.glob(f"*{kind}*.txt")) for kind in ("ahead", "at-run"))
    assert "library" in ahead.read_text()
    assert "library" not in later.read_text()
    assert "-DMLX_ADADELTA_METALLIB=OFF" in later.read_text()


def test_goes_on_after_failures(
    mac: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing").write_text("adadelta.metal bench")
    out = tmp_path / "report"
    assert mac.main(["--out", str(out)]) == 1
    found = results(out)
    assert found.pop("compile") == "failed: exit status 3"
    assert found.pop("tests ahead of time") == "left out: the source does not compile"
    assert found.pop("metallib is there").startswith("left out")
    assert found.pop("benchmark") == "failed: exit status 3"
    assert found and set(found.values()) == {"passed"}
    markdown = (out / "report.md").read_text()
    assert "## compile failed: exit status 3" in markdown
    assert "adadelta.metal broke" in markdown
    errors = capsys.readouterr().err
    assert "error: compile failed" in errors and "error: benchmark failed" in errors


def test_a_program_that_is_not_there(mac: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "scripts/tune").unlink()
    out = tmp_path / "report"
    assert mac.main(["--out", str(out)]) == 1
    assert results(out)["tune"].startswith("failed: [Errno 2]")
    assert results(out)["train"] == "passed"


def test_without_a_toolchain(mac: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "no-toolchain").touch()
    out = tmp_path / "report"
    assert mac.main(["--out", str(out)]) == 0
    assert results(out)["compile"] == "left out: no Metal toolchain"
    assert results(out)["tests at run time"] == "passed"


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_elsewhere_it_needs_a_mac() -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / "mac")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "error: scripts/mac needs a Mac\n")
