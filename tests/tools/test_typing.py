"""A user's project under mypy --strict and pyright, against the wheel's stubs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent / "user_project"

Errors = set[tuple[str, int]]


def run_checker(*arguments: str | Path) -> str:
    """The standard output of a checker that found errors, or none."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy(python: Path, cache: Path) -> Errors:
    output = run_checker(
        *("mypy", "--strict", "--python-executable", python, "--cache-dir", cache),
        *("--config-file=", "--no-error-summary", "--output", "json", "."),
    )
    found = [json.loads(line) for line in output.splitlines()]
    return {(x["file"], x["line"]) for x in found if x["severity"] == "error"}


def pyright(python: Path, _: Path) -> Errors:
    output = run_checker("pyright", "--outputjson", "--pythonpath", python, ".")
    found = json.loads(output)["generalDiagnostics"]
    return {
        (Path(x["file"]).name, x["range"]["start"]["line"] + 1)
        for x in found
        if x["severity"] == "error"
    }


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_right_uses_pass_and_wrong_ones_do_not(
    checker: Callable[[Path, Path], Errors], installation: Path, tmp_path: Path
) -> None:
    lines = (PROJECT / "wrong.py").read_text().splitlines()
    marked = {("wrong.py", i) for i, line in enumerate(lines, 1) if "# wrong" in line}
    assert marked
    assert checker(installation, tmp_path) == marked
