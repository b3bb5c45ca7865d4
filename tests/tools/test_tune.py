"""scripts/tune, with a bench that reports what the copy's header says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

# Stands for scripts/bench: its figure is made from the constants.
BENCH = r"""
root=$(dirname -- "$0")/..
mkdir -p "$root/out"
value() { sed -n "s/.*$1 = \([0-9]*\).*/\1/p" "$root/metal/adadelta_step.h"; }
x=$(value kThreads)$(value kTileBytes | head -1).$(value kElementsPerThread)
results="{\"ours\": {\"of_limit\": {\"median\": $x, \"q1\": $x, \"q3\": $x}}}"
for name in large transformer; do
  echo "{\"name\": \"$name\", \"results\": $results}"
done | paste -sd , | sed 's/.*/{"cases": [&]}/' >"$root/out/bench.json"
"""


@pytest.fixture
def tune() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune", SCRIPTS / "tune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_value_is_built_and_measured(
    tune: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("scripts", "metal"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scripts/bench").write_text(BENCH)
    header = (SCRIPTS.parent / tune.HEADER).read_text()
    (tmp_path / tune.HEADER).write_text(header)
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    tune.main([])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("as shipped: large 256128.400 (256128.400 to")
    large = [row.split(": large ")[1].split()[0] for row in rows]
    # threads, tile, elements: the shipped ones, then one at a time
    assert large == [
        *("256128.400", "256128.800", "256128.160"),
        *("128128.400", "512128.400", "1024128.400", "256256.400"),
    ]
    assert (tmp_path / tune.HEADER).read_text() == header


def test_a_constant_that_is_not_there(tune: ModuleType) -> None:
    with pytest.raises(ValueError, match="must set kThreads once but does 0 times"):
        tune.set_constant("kTileBytes = 128", "kThreads", 1)


def test_a_bench_that_fails(
    tune: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/bench").write_text("echo no gpu here >&2; exit 2")
    with pytest.raises(SystemExit, match="scripts/bench failed:\nno gpu here"):
        tune.measure(tmp_path, [])
