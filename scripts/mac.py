"""Compiles, tests, measures and tunes on a Mac, and writes a report to send in.

Goes on after a failure; the report says what failed. Takes an hour or two, with
--quick about half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ".venv/bin/python"
METAL = ["xcrun", "-sdk", "macosx", "metal"]
STRICT = [
    *["-std=metal3.1", "-mmacosx-version-min=14.0", "-I", "metal"],
    *["-Wall", "-Wextra", "-Werror", "-fno-fast-math"],
]
NATIVE = 'from mlx_adadelta.backend import has_native; assert has_native("metal")'
DEVICE = (
    "import json, mlx.core as mx;"
    "print(json.dumps({'MLX': mx.__version__, **mx.device_info(mx.gpu)}))"
)
MACHINE = {
    "chip": ["sysctl", "-n", "machdep.cpu.brand_string"],
    "memory in bytes": ["sysctl", "-n", "hw.memsize"],
    "macOS": ["sw_vers", "-productVersion"],
    "Xcode": ["xcodebuild", "-version"],
    "Metal compiler": [*METAL, "--version"],
    "commit": ["git", "describe", "--always", "--dirty", "--abbrev=40"],
}


@dataclass(frozen=True)
class Step:
    """What came of one command."""

    name: str
    command: list[str]
    result: str  # "passed", "failed: ..." or "left out: ..."
    seconds: float
    log: str  # its file in the report's folder


class Report:
    """The folder to send in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps: list[Step] = []

    def run(self, name: str, *command: str, unless: str = "", **extra: str) -> bool:
        """Runs a command with more environment, and keeps what it prints."""
        log = self.folder / f"{len(self.steps) + 1:02}-{name.replace(' ', '-')}.txt"
        print(f"==> {name}", file=sys.stderr, flush=True)
        start, result = time.monotonic(), "passed"
        if unless:
            result = f"left out: {unless}"
        else:
            with log.open("w") as file:
                try:
                    code = subprocess.run(
                        command,
                        cwd=ROOT,
                        env={**os.environ, **extra},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        check=False,
                    ).returncode
                    if code != 0:
                        result = f"failed: exit status {code}"
                except OSError as error:
                    result = f"failed: {error}"
        print(f"    {result}", file=sys.stderr, flush=True)
        took = round(time.monotonic() - start, 1)
        self.steps.append(Step(name, list(command), result, took, log.name))
        return result == "passed"

    def write(self, machine: dict[str, Any]) -> None:
        bench = self.folder / "bench"
        figures = bench / "bench.json"
        record = {
            "machine": machine,
            "steps": [asdict(step) for step in self.steps],
            "benchmark": json.loads(figures.read_text()) if figures.exists() else None,
        }
        (self.folder / "report.json").write_text(json.dumps(record, indent=1) + "\n")
        lines = ["# mlx-adadelta on a Mac", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in machine.items()]
        lines += ["", "| step | result | seconds |", "|---|---|---:|"]
        lines += [f"| {s.name} | {s.result} | {s.seconds} |" for s in self.steps]
        for step in self.steps:
            if step.result.startswith("failed"):
                lines += ["", f"## {step.name} {step.result}", "", *self._quote(step)]
        for step in self.steps:
            if step.name == "tune" and step.result == "passed":
                lines += ["", "## Tuning", "", *self._quote(step)]
        if (bench / "bench.md").exists():
            lines += ["", "## Benchmark, in bench/", ""]
            lines += (bench / "bench.md").read_text().splitlines()
        (self.folder / "report.md").write_text("\n".join([*lines, ""]))

    def _quote(self, step: Step) -> list[str]:
        log = self.folder / step.log
        text = log.read_text(errors="replace") if log.exists() else ""
        return ["```", *text.splitlines()[-60:], "```", f"All of it: {step.log}"]


def output(*command: str) -> str:
    """What a command prints, in one line, or why it does not."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError as error:
        return str(error)
    return " ".join((done.stdout if done.returncode == 0 else done.stderr).split())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mac", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller benchmarks")
    parser.add_argument("--out", type=Path, default=ROOT / "out/mac", metavar="FOLDER")
    options = parser.parse_args(argv)
    if sys.platform != "darwin":
        print("error: scripts/mac needs a Mac", file=sys.stderr)
        return 1
    report = Report(options.out.resolve())
    quick = ["--quick"] if options.quick else []
    machine: dict[str, Any] = {key: output(*MACHINE[key]) for key in MACHINE}

    toolchain = subprocess.run([*METAL, "--version"], capture_output=True, check=False)
    absent = "" if toolchain.returncode == 0 else "no Metal toolchain"
    library = str(report.folder / "compiled.metallib")
    sources = ["metal/adadelta.metal", "metal/norm.metal", "-o", library]
    compiled = report.run("compile", *METAL, *STRICT, *sources, unless=absent)
    refused = "" if compiled else absent or "the source does not compile"
    report.run("tests ahead of time", "scripts/test", unless=refused)
    there = "find .venv -name mlx_adadelta.metallib | grep ."
    report.run("metallib is there", "bash", "-c", there, unless=refused)
    # From here on the run-time compiler, whatever became of the other.
    for shipped in (ROOT / ".venv").glob("**/mlx_adadelta.metallib"):
        shipped.unlink()
    later = {"CMAKE_ARGS": "-DMLX_ADADELTA_METALLIB=OFF"}
    report.run("tests at run time", "scripts/test", **later)
    report.run("metal takes part", PYTHON, "-c", NATIVE)
    bench = str(report.folder / "bench")
    arguments = ["--device", "gpu", "--out", bench, *quick]
    report.run("benchmark", "scripts/bench", *arguments, **later)
    report.run("tune", "scripts/tune", *quick, **later)
    plot = str(report.folder / "train.png")
    report.run("train", "scripts/train", "--epochs", "2", "--out", plot, **later)

    device = output(PYTHON, "-c", DEVICE)
    machine |= json.loads(device) if device.startswith("{") else {"MLX": device}
    report.write(machine)
    failed = [step.name for step in report.steps if step.result.startswith("failed")]
    print(f"written: {report.folder}/report.md, report.json", file=sys.stderr)
    for name in failed:
        print(f"error: {name} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
