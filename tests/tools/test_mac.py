"""scripts/mac, on Linux: the steps, the report and failures, with mocked programs."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
METALLIB = ".venv/mlx_adadelta.metallib"
PROGRAMS = ["bin/xcrun", "bin/sysctl", "bin/sw_vers", "bin/xcodebuild", "bin/git"]
PROGRAMS += ["bin/uname", "scripts/test", "scripts/bench", "scripts/tune"]
PROGRAMS += ["scripts/train", ".venv/bin/python"]

# Stands for every program: prints its name and arguments, and fails where told to.
PROGRAM = """#!/usr/bin/env bash
name=$(basename -- "$0")
case "$name $*" in
  uname*) echo Darwin; exit ;;
  *device_info*) echo "1.2.3 {'device_name': 'Apple M9'}"; exit ;;
esac
echo "$name $* ${CMAKE_ARGS:-} $([ -e METALLIB ] && echo library)"
case "$name $*" in
  *--version*) [ -e no-toolchain ] && exit 1 ;;
  "bench "*) mkdir -p "$4"; echo figures >"$4/bench.md" ;;
esac
for failing in $(cat failing 2>/dev/null); do
  case "$name $*" in *"$failing"*) echo "$failing broke"; exit 3 ;; esac
done
exit 0
""".replace("METALLIB", METALLIB)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the script in a tree of mocked programs."""
    for folder in ("scripts", ".venv/bin", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("mac", "_setup.sh"):
        shutil.copy(SCRIPTS / name, tmp_path / "scripts")
    for program in PROGRAMS:
        (tmp_path / program).write_text(PROGRAM)
        (tmp_path / program).chmod(0o755)
    (tmp_path / METALLIB).touch()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "scripts/mac", "--out", "a report", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


def results(folder: Path) -> dict[str, str]:
    """By step, from the second table."""
    lines = (folder / "a report/report.md").read_text().splitlines()
    start = lines.index("| step | result | seconds |") + 2
    rows = [line.split(" | ") for line in lines[start : lines.index("", start)]]
    return {name.removeprefix("| "): result for name, result, *_ in rows}


def test_all_goes_well(mac: Run, tmp_path: Path) -> None:
    done = mac("--quick")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert len(found) == 8 and set(found.values()) == {"passed"}
    out = tmp_path / "a report"
    report = (out / "report.md").read_text()
    for text in (
        *("| chip | sysctl -n machdep.cpu.brand_string", "| macOS | sw_vers -prod"),
        *("| MLX | 1.2.3 {'device_name': 'Apple M9'}", "| compile | passed |"),
        *("## Tuning", "tune --quick", "\nfigures\n"),
    ):
        assert text in report
    # Compiled ahead of time in the first run, at run time in the second.
    ahead, later = (next(out.glob(f"*{kind}*.txt")) for kind in ("ahead", "at-run"))
    assert "library" in ahead.read_text()
    assert "library" not in later.read_text()
    assert "-DMLX_ADADELTA_METALLIB=OFF" in later.read_text()


def test_goes_on_after_failures(mac: Run, tmp_path: Path) -> None:
    (tmp_path / "failing").write_text("adadelta.metal bench")
    (tmp_path / "scripts/tune").unlink()
    done = mac()
    assert done.returncode == 1
    assert done.stderr.endswith("error: failed: compile, benchmark, tune\n")
    found = results(tmp_path)
    assert found.pop("compile") == "failed: exit status 3"
    assert found.pop("benchmark") == "failed: exit status 3"
    assert found.pop("tune") == "failed: exit status 127"
    assert list(found) == ["tests at run time", "metal takes part", "train"]
    assert set(found.values()) == {"passed"}
    report = (tmp_path / "a report/report.md").read_text()
    assert "## compile failed: exit status 3" in report
    assert "adadelta.metal broke" in report and "## Tuning" not in report


def test_without_a_toolchain(mac: Run, tmp_path: Path) -> None:
    (tmp_path / "no-toolchain").touch()
    assert mac().returncode == 0
    found = results(tmp_path)
    assert found["compile"] == "left out: no Metal toolchain"
    assert found["tests at run time"] == "passed"


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_elsewhere_it_needs_a_mac() -> None:
    done = subprocess.run(
        ["bash", str(SCRIPTS / "mac")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("", "error: scripts/mac needs a Mac\n")
